"""Shell completion of `mocte-ds`: the tools, the options of each, and run and study files by name."""

import ast
from collections.abc import Mapping
from pathlib import Path

from mocte_ds.errors import ConfigError
from mocte_ds.shipped import LAUNCH, TOOLS, shipped_names

SHELLS = ("bash", "zsh")
_MORE = {"pretrain": LAUNCH / "pretrain.py"}
"""Scripts whose options a tool passes on."""
_SCRIPT = """_mocte_ds() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} options=""
  local tool=${{COMP_WORDS[1]//-/_}} names=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{tools} --help --version" -- "$word"))
    return
  fi
  case $tool in
{options}
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options --help" -- "$word"))
    return
  fi
  case $before in
    --run | --run-file) names="{runs}" ;;
    *) [ "$tool/$COMP_CWORD" = study/2 ] && names="{studies}" ;;
  esac
  COMPREPLY=($(compgen -W "$names" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _mocte_ds mocte-ds
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, tools: Mapping[str, str]) -> str:
    """What a shell has to read, e.g. `source <(mocte-ds completion bash)`.

    Args:
        shell: one of :data:`SHELLS`; zsh reads bash's by its own bashcompinit.
        tools: names of the tools, and what each does.

    Raises:
        ConfigError: another shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is no completion for {shell[:40]!r}; shells: {', '.join(SHELLS)}.")
    cases = [f'    {name}) options="{" ".join(_options(name))}" ;;' for name in tools if _options(name)]
    runs, studies = (" ".join(shipped_names(kind)) for kind in ("runs", "studies"))
    names = " ".join([*tools, "completion"])
    text = _SCRIPT.format(tools=names, options="\n".join(cases), runs=runs, studies=studies)
    return (_ZSH if shell == "zsh" else "") + text


def _options(tool: str) -> list[str]:
    """Long options of a tool, read from its source: to import it would take seconds."""
    paths = [TOOLS / f"{tool}.py", *filter(None, [_MORE.get(tool)])]
    return sorted({option for path in paths for option in _declared(path)})


def _declared(path: Path) -> list[str]:
    """Long options of the calls of add_argument in a file, without those that only launchers give."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            hidden = any(key.arg == "help" and getattr(key.value, "attr", "") == "SUPPRESS" for key in node.keywords)
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            found += [word for word in words if isinstance(word, str) and word.startswith("--") and not hidden]
    return found
