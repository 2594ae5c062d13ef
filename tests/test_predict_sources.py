# SPDX-License-Identifier: BSD-3-Clause
"""Which files ``predict`` takes, and in which order."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from resnet_fused.predict.sources import Found, check, count, expand


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images at two depths, other files, a hidden one, an empty folder; also the current folder."""
    names = "b.jpg a.PNG notes.txt ._b.jpg sub/c.webp sub/deeper/d.tiff sub/e.jpeg.txt [1].jpg"
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(*sources: str) -> list[str]:
    found = list(expand(sources))
    assert all(item.error is None for item in found)
    return [item.path.replace(os.sep, "/") for item in found]


@pytest.mark.usefixtures("tree")
def test_folder_is_searched_in_order_of_names_for_images_only() -> None:
    """Breaks if the order depends on the file system, or text and hidden files are taken."""
    assert paths(".") == ["./[1].jpg", "./a.PNG", "./b.jpg", "./sub/c.webp", "./sub/deeper/d.tiff"]


@pytest.mark.usefixtures("tree")
def test_sources_keep_the_order_of_the_command_line() -> None:
    """Breaks if sources are sorted, or a named file is refused for its ending."""
    assert paths("notes.txt", "sub/deeper", "b.jpg") == ["notes.txt", "sub/deeper/d.tiff", "b.jpg"]


@pytest.mark.usefixtures("tree")
def test_globs() -> None:
    """Breaks if ** does not recurse, a matched folder is not searched, or matches are unsorted."""
    assert paths("*.[jP]*") == ["[1].jpg", "a.PNG", "b.jpg"]
    assert paths("**/*.tiff") == ["sub/deeper/d.tiff"]
    assert paths("su?") == ["sub/c.webp", "sub/deeper/d.tiff"]


@pytest.mark.usefixtures("tree")
def test_existing_name_with_brackets_is_no_glob() -> None:
    """Breaks if '[1].jpg' is read as a pattern, which matches '1.jpg' only."""
    assert paths("[1].jpg") == ["[1].jpg"]


def test_list_file_with_blank_lines_crlf_bom_and_foreign_bytes(tree: Path) -> None:
    """Breaks if a line end stays on a name, or a name that is not UTF-8 stops the list."""
    (tree / "list.txt").write_bytes(b"\xef\xbb\xbfb.jpg\r\n\n  spaced.jpg\nsub/deeper\n\xff.jpg")
    assert paths("@list.txt") == ["b.jpg", "  spaced.jpg", "sub/deeper/d.tiff", "\udcff.jpg"]


@pytest.mark.usefixtures("tree")
def test_stdin_lines_are_files_or_folders_and_never_patterns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if a line is expanded as a glob or list, or stdin is read to count it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("sub/deeper\n*.jpg\n"))
    assert count(["-"]) is None
    assert paths("-") == ["sub/deeper/d.tiff", "*.jpg"]


@pytest.mark.usefixtures("tree")
def test_sources_that_give_nothing_say_so() -> None:
    """Breaks if an empty folder or a pattern without match vanishes from the results."""
    (folder,) = expand(["empty"])
    assert folder.path == "empty" and "no image in this folder" in (folder.error or "")
    assert list(expand(["*.gif"])) == [Found("*.gif", "no file matches this pattern")]


def test_folder_that_cannot_be_listed_is_an_error_not_a_gap(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if an unreadable subfolder is skipped silently."""
    real = os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("deeper"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(expand([str(tree / "sub")]))[1:] == [
        Found(str(tree / "sub" / "deeper"), "Permission denied")
    ]


def test_links_are_followed_and_loops_end(tree: Path) -> None:
    """Breaks if a linked data set is left out or a link to a parent recurses for ever."""
    (tree / "sub" / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "link").symlink_to(tree / "sub" / "deeper", target_is_directory=True)
    assert paths("link") == ["link/d.tiff"]
    assert paths("sub") == ["sub/c.webp", "sub/deeper/d.tiff"] + [
        f"sub/loop/{name}" for name in ("[1].jpg", "a.PNG", "b.jpg", "link/d.tiff")
    ]


@pytest.mark.usefixtures("tree")
def test_count_is_the_number_of_items() -> None:
    """Breaks if the progress bar's total leaves out failed sources or counts other files."""
    sources = [".", "*.gif", "empty", "missing.jpg"]
    assert count(sources) == len(list(expand(sources))) == 8


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one"),
        (["-", "a.PNG", "-"], "at most once"),
        (["@missing.txt"], "'missing.txt'.*write ./@missing.txt"),
        (["@sub"], "no file 'sub'"),
    ],
)
def test_mistakes_are_refused_before_work_begins(sources: list[str], message: str) -> None:
    """Breaks if a mistyped list is noticed only after the model was loaded, or not at all."""
    with pytest.raises(ValueError, match=message):
        check(sources)
