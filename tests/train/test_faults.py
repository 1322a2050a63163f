"""What a user or the machine does to a run: it ends with one line, and nothing is lost silently."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.image_files import append, write_lists
from tests.train.runs import (
    FLAGS,
    ROOT,
    equal,
    finish,
    in_step,
    launch,
    left,
    load_state,
    main,
    ranks_environment,
    write_folder,
)
from train import checkpoint, compare
from train.config import TrainError

FILES = ("--augment", "inat", "--image-size", 16, "--net", "convnet", "--batch-size", 8)
SHORT = ("--epochs", 1, "--stage2-epochs", 1, "--views", 1)


def shell(*flags, module="train", pipe=None, **environment):
    """`python -m MODULE FLAGS`, as a user's shell runs it, with its output."""
    command = [sys.executable, "-m", module, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | environment
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "timeout": 300}
    if pipe:
        script = f'"$@" | {pipe}; echo "${{PIPESTATUS[0]}}"'
        command = ["bash", "-c", script, "bash", *command]
    done = subprocess.run(command, **options)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def lists(tmp_path):
    return write_folder(tmp_path / "data", train=(30, 14, 6), val=(4, 4, 4), test=(4, 4, 4))


def flags_of(lists, out, *more):
    flags = [*FLAGS, "--data", lists, "--out", out, "--epochs", 3, "--stage2-epochs", 1]
    return [*map(str, [*flags, *FILES, "--views", 1, "--workers", 2, *more])]


def kill_a_reader_in_step(number):
    in_step(number, lambda: os.kill(multiprocessing.active_children()[0].pid, 9))


def lose_in_step(number, image):
    in_step(number, lambda: image.unlink(missing_ok=True))  # perhaps another process's step did


def count_readers_in_step(number, path):
    in_step(number, lambda: path.write_text(str(len(multiprocessing.active_children()))))


@pytest.mark.parametrize("fault", ["reader", "image"])
def test_a_run_that_loses_images_saves_its_work(lists, tmp_path, fault):
    image = lists / "train/0/29.png"
    content, flags = image.read_bytes(), flags_of(lists, tmp_path / "out")
    before = (kill_a_reader_in_step, 8) if fault == "reader" else (lose_in_step, 8, image)
    finish(launch(tmp_path / "log.txt", *flags, before=before), 1)
    *_, last = (tmp_path / "log.txt").read_text().strip().splitlines()
    wanted = (
        "error: --workers: got the end of"
        if fault == "reader"
        else f"error: --data: got images that cannot be read, {image} ("
    )
    assert last.startswith(wanted) and last.endswith("goes on")  # says that --resume does
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    saved = load_state(tmp_path / "out/checkpoint.pt")
    assert 7 * saved["epoch"] + saved["step"] >= 8  # the step of the fault counts
    if fault == "image":
        with pytest.raises(TrainError, match=r"train\.txt:30: got .*29\.png, which is not there"):
            main([*flags, "--resume"])
        image.write_bytes(content)
    main([*flags, "--resume"])
    main(flags_of(lists, tmp_path / "whole"))
    assert equal(left(tmp_path / "out"), left(tmp_path / "whole"))


def test_processes_that_lose_an_image_in_the_first_epoch(lists, tmp_path):
    """None can save then, and they go on from what they saved at the start."""
    image = lists / "train/0/29.png"
    content = image.read_bytes()

    def processes(out, *more, before=None):
        flags = flags_of(lists, tmp_path / out, "--stage2-epochs", 0, *more)
        flags[flags.index("--workers") + 1] = "0"
        settings = [env | {"GLOO_SOCKET_IFNAME": "lo"} for env in ranks_environment(2)]
        return [launch(tmp_path / env["RANK"], *flags, before=before, **env) for env in settings]

    undisturbed = processes("whole")
    for process in undisturbed:
        finish(process)
    for process in processes("out", before=(lose_in_step, 1, image)):
        finish(process, 1)
    saved = load_state(tmp_path / "out/checkpoint.pt")
    assert (saved["epoch"], saved["step"]) == (0, 0)
    image.write_bytes(content)
    for process in processes("out", "--resume"):
        finish(process)
    assert equal(*(load_state(tmp_path / out / "stage1.pt") for out in ("whole", "out")))


def test_one_pool_reads_all_splits(lists, tmp_path):
    log, count = tmp_path / "log.txt", tmp_path / "count"
    flags = flags_of(lists, tmp_path / "out", "--select", "val")
    finish(launch(log, *flags, before=(count_readers_in_step, 10, count)))  # after an evaluation
    assert count.read_text() == "2"


def test_a_damaged_model_is_not_resumed_from(folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out", tmp_path, *SHORT]
    main(flags)
    path = tmp_path / "stage1.pt"
    content, tensor = path.read_bytes(), load_state(path)["feat_state_dict"]
    largest = max(tensor.values(), key=torch.Tensor.numel)
    largest = largest.permute(0, 2, 3, 1).numpy().tobytes()  # of a convolution, in channels-last
    place = content.index(largest) + len(largest) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(TrainError, match=r"--resume: got .*stage1\.pt, unreadable \(wrong check"):
        main([*flags, "--resume"])
    with pytest.raises(TrainError, match=r"--model: got .*stage1\.pt, unreadable \(wrong checksum"):
        main([*flags, "--out", tmp_path / "other", "--model", path])


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    data = write_folder(tmp_path / "data", train=(9, 5), test=(3, 3))
    flags = [
        *FLAGS,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--batch-size",
        4,
        "--net",
        "convnet",
        *SHORT,
    ]
    main(flags)
    original = (data / "train.txt").read_text()
    (tmp_path / "moved").symlink_to(data)
    main([*flags, "--data", tmp_path / "moved", "--resume"])  # the same images elsewhere
    for change in ("test/0/0.png 2", "train/0/8.png 0", ""):
        (data / "train.txt").write_text(original)
        lines = original.splitlines()
        more = [change.replace("test/0/0", "more")] if change else []
        (data / "more.png").write_bytes((data / "test/0/0.png").read_bytes())
        (data / "train.txt").write_text("\n".join([*(lines if more else lines[1:]), *more]))
        with pytest.raises(TrainError, match=r"another configuration: data set: got [23] classes"):
            main([*flags, "--resume"])


def test_a_batch_larger_than_the_data(folder, tmp_path):
    main([*FLAGS, "--data", folder, "--out", tmp_path, "--batch-size", 10**9, *SHORT])
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "net, reason",
    [("timm:vit_tiny_patch16_224", "64"), ("timm:nix", "Unknown")],
)
def test_a_net_that_does_not_fit_the_images(tmp_path, net, reason):
    data = write_lists(tmp_path / "data", (100, 90), train=[0, 1] * 4, test=[0, 1])
    flags = ["--dataset", "list", "--data", data, "--device", "cpu", "--net", net]
    with pytest.raises(TrainError, match=rf"--net: got {net} \(.*{reason}.*wanted"):
        main([*flags, "--out", tmp_path / "out"])
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_a_refused_pickle_gives_no_dangerous_advice(folder, tmp_path):
    state = {"feat_state_dict": {}, "fc_state_dict": {}, "path": Path("x")}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(TrainError, match=r"damaged or holds objects that could run code") as error:
        main([*FLAGS, "--data", folder, "--out", tmp_path, "--model", tmp_path / "model.pt"])
    assert "weights_only" not in str(error.value)


def test_a_list_that_may_not_be_read(folder, tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(TrainError, match=r"--data: got .*train\.txt \(Permission denied\), wanted"):
        main([*FLAGS, "--data", folder, "--out", tmp_path])


def test_brackets_and_colons_in_paths_are_printed(tmp_path, capsys):
    out = tmp_path / "[/bold] [red]:smile:"
    data = write_folder(tmp_path / "[x]", train=(6, 4), test=(2, 2))
    append(data / "train.txt", "train/0/0.png 0")
    flags = [*FLAGS, "--data", data, "--batch-size", 4, "--net", "convnet", *SHORT]
    main([*flags, "--out", out])
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"{out}/result.json" in printed and "such as " + str(data) in printed
    main([*flags, "--out", out, "--evaluate", "--model", out / "stage1.pt"])
    printed = "".join(capsys.readouterr().out.split())
    assert "[/bold][red]:smile:/stage1.pt" in printed


def test_shell_of_another_locale(folder, tmp_path):
    """In this locale the name's bytes are no characters, as those of a name that is not UTF-8."""
    flags, out = [*FLAGS, "--data", folder, "--net", "convnet", *SHORT], tmp_path / "öß"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, printed, _ = shell(*flags, "--out", out, **locale)
    assert code == 0 and "/result.json" in printed
    assert (out / "result.json").exists()


def test_a_path_that_would_break_the_line(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"a\rb\x1b[2J.png 0\n")
    (tmp_path / "test.txt").write_text("c.png 0\n")
    code, _, errors = shell("--dataset", "list", "--data", tmp_path)
    assert code == 1 and len(errors.splitlines()) == 1
    assert r"a\rb\x1b[2J.png, which is not there" in errors


@pytest.mark.parametrize("module", ["train", "train.compare", "train.report"])
def test_help_into_a_pipe_that_is_closed(module):
    code, printed, errors = shell("--help", module=module, pipe="head -c 1")
    assert code == 0 and errors == "" and printed.splitlines()[-1][-3:] in ("141", "u0", "0")


@pytest.mark.parametrize("module", ["train", "train.compare", "train.report"])
def test_help_and_wrong_flags_do_without_torch(module):
    for flags in (["--help"], ["--heads", "foo", "--head", "foo"]):
        command = [sys.executable, "-X", "importtime", "-m", module, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == (0 if flags == ["--help"] else 2)
        assert not re.search(r"\| +(torch|pandas|numpy|matplotlib)$", done.stderr, re.MULTILINE)


def test_compare_refuses_wrong_flags_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(TrainError, match="--jobs: got 0, wanted 1 or more"):
        compare.main(["--jobs", "0", "--out", str(tmp_path)])
    for wrong in (["--heads", "softmax,foo"], ["--seeds", "x"], ["--epochs", "0"]):
        with pytest.raises(SystemExit) as end:
            compare.main([*wrong, "--out", str(tmp_path)])
        assert end.value.code == 2
        assert wrong[-1].split(",")[-1] in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_too_little_memory_is_told(folder, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee docs")

    from train import command
    from train.config import parse_config

    monkeypatch.setattr(command, "train", full)
    flags = [*map(str, [*FLAGS, "--data", folder, "--out", tmp_path])]
    with pytest.raises(TrainError, match=r"--batch-size: got 32, .*memory .*2 GiB.*fewer images"):
        command.main(parse_config(flags))
    assert checkpoint.first_line(ValueError()) == "ValueError"


def test_an_error_is_one_line(tmp_path):
    code, _, errors = shell("--dataset", "list", "--data", tmp_path / "none")
    assert code == 1 and errors.startswith("error: --data: got") and errors.count("\n") == 1
