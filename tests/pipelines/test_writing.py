"""Files and folders that are whole or not there."""

import json
import os
import threading

import pytest

from score_sde.pipelines import writing
from score_sde.pipelines.writing import whole_file, whole_folder, write_json


def entries(folder):
    return sorted(os.listdir(folder))


def test_a_file_takes_its_place_in_the_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    with whole_file(path) as temporary:
        assert path.read_text() == "before"
        with open(temporary, "w") as file:
            file.write("after")
    assert path.read_text() == "after" and entries(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~writing._UMASK


def test_what_failed_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "b") as temporary:
        open(os.path.join(temporary, "file"), "w").close()
        raise RuntimeError
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [None, [], ["old"]])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, before, exchange):
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    path = tmp_path / "folder"
    if before is not None:
        path.mkdir()
        for name in before:
            (path / name).touch()
    with whole_folder(path) as temporary:
        open(os.path.join(temporary, "new"), "w").close()
        assert before is None or entries(path) == before
    assert entries(path) == ["new"] and entries(tmp_path) == ["folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_many_writers_of_one_folder(tmp_path, monkeypatch, exchange):
    """Each of them succeeds, and what stands there in the end is of one of them."""
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    errors = []

    def write(number):
        try:
            for _ in range(20):
                with whole_folder(tmp_path / "folder") as temporary:
                    for name in "ab":
                        with open(os.path.join(temporary, name), "w") as file:
                            file.write(str(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and entries(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text()
