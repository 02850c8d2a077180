"""Packages: read without unpacking them, found in a folder, held against checksums, downloaded by their own clients."""

from pathlib import Path

import pytest

from mocte_ds.errors import DataError
from mocte_ds.ownership import hash_file
from mocte_ds.packages import Package, file_of, read_members
from tests.packages.by_hand import deb, tarball, wheel

FILES = {"a/one.txt": b"1", "a/two.py": b"2", "b/one.txt": b"3"}


def test_every_form_gives_its_files(tmp_path: Path) -> None:
    made = [wheel(tmp_path / "p.whl", FILES), tarball(tmp_path / "p.tgz", FILES), deb(tmp_path / "p.deb", FILES)]
    made.append(deb(tmp_path / "z.deb", FILES, "zst"))
    folder = tmp_path / "folder"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for path in (*made, folder):
        assert dict(read_members(path, r".*/one\.txt")) == {"a/one.txt": b"1", "b/one.txt": b"3"}, path
        assert not list(read_members(path, "one.txt")), "the whole name has to match"


@pytest.mark.parametrize("suffix", ["whl", "tgz", "deb"])
def test_a_damaged_package_is_refused(tmp_path: Path, suffix: str) -> None:
    path = {"whl": wheel, "tgz": tarball, "deb": deb}[suffix](tmp_path / f"p.{suffix}", {"a": bytes(range(256)) * 40})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"p\.{suffix} is damaged"):
        list(read_members(path, ".*"))
    with pytest.raises(DataError, match="is not a wheel, npm tarball or Debian package"):
        list(read_members(tmp_path / "p.exe", ".*"))


def test_a_pinned_file_is_the_one_that_was_looked_through(tmp_path: Path) -> None:
    path = wheel(tmp_path / "some_texts-1.0-py3-none-any.whl", FILES)
    package = Package("pypi", "some-texts", "1.0", hash_file(path).sha256)
    assert file_of(package, tmp_path / "work", tmp_path) == path
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(DataError, match="is not the file of some-texts 1.0: its sha256 is"):
        file_of(package, tmp_path / "work", tmp_path)
    with pytest.raises(DataError, match=r"has no file @?some-texts-2\.tgz; download it .*npm pack .*some/texts@2"):
        file_of(Package("npm", "@some/texts", "2", "0"), tmp_path / "work", tmp_path)
    deb(tmp_path / "texts_1_all.deb", FILES)
    assert file_of(Package("debian", "texts"), tmp_path, tmp_path).name == "texts_1_all.deb"
    deb(tmp_path / "texts_2_all.deb", FILES)
    with pytest.raises(DataError, match=r"several files of texts: texts_1_all\.deb, texts_2_all\.deb; keep one"):
        file_of(Package("debian", "texts"), tmp_path, tmp_path)


@pytest.mark.parametrize("registry", ["npm", "debian"])
def test_a_missing_client_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="texts.* could not be downloaded: .*No such file.*Download it elsewhere"):
        file_of(Package(registry, "texts"), tmp_path)
