"""Things that only one module may do, and things that none may."""

from __future__ import annotations

from tests.architecture.source import PRODUCT, files, imported, mentioned, name

ENVIRONMENT = {"os.environ", "os.getenv", "os.putenv", "os.unsetenv", "os.environb", "os.getenvb"}
WALL_CLOCK = {"time.time", "time.time_ns"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def test_only_configs_env_reads_the_environment() -> None:
    readers = {
        f"{name(path)}:{line} {what}"
        for path in files(*PRODUCT)
        for line, what in mentioned(path)
        if what in ENVIRONMENT and name(path) != "configs/env.py"
    }
    assert readers == set()


def test_the_rule_about_the_environment_sees_its_one_reader() -> None:
    (reader,) = [path for path in files("configs") if name(path) == "configs/env.py"]
    assert "os.environ" in {what for _, what in mentioned(reader)}


def test_only_clock_modules_read_the_wall_clock() -> None:
    readers = {
        f"{name(path)}:{line} {what}"
        for path in files(*PRODUCT)
        for line, what in mentioned(path)
        if what in WALL_CLOCK and path.name not in {"clock.py", "clocks.py"}
    }
    assert readers == set()


def test_no_pickle() -> None:
    users = {
        f"{name(path)}:{line} {what}"
        for path in files(*PRODUCT)
        for line, what in imported(path)
        if what.split(".")[0] in PICKLES or what in {"torch.load", "torch.save"}
    }
    users |= {
        f"{name(path)}:{line} {what}"
        for path in files(*PRODUCT)
        for line, what in mentioned(path)
        if what in {"torch.load", "torch.save"}
    }
    assert users == set()
