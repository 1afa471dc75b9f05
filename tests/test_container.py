"""The Dockerfile: built on a base image that the environment names, and used for what it is there for.

With buildah, which needs no daemon, and a base that is a Debian or Ubuntu, for instance one of debootstrap's:

    LMC_CONTAINER_BASE=localhost/bookworm BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs pytest tests/test_container.py

`LMC_CONTAINER_FLAGS` is added to the build: volumes with packages that lie on the machine.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from conftest import REPO

BASE = os.environ.get("LMC_CONTAINER_BASE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not BASE, reason="LMC_CONTAINER_BASE names no image to build the Dockerfile on"),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed"),
]


def buildah(*arguments: str, seconds: int = 300) -> str:
    done = subprocess.run(["buildah", *arguments], cwd=REPO, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    flags = shlex.split(os.environ.get("LMC_CONTAINER_FLAGS", ""))
    buildah("bud", "--layers", "--build-arg", f"BASE={BASE}", *flags, "-t", "lmc_dist_test", ".", seconds=1500)
    name = buildah("from", "localhost/lmc_dist_test").strip()
    yield name
    buildah("rm", name)


def test_the_image_trains_and_unlearns_on_two_ranks(container: str) -> None:
    found = {
        line.split()[0]: line.split()[1:] for line in buildah("run", container, "--", "lmc", "doctor").splitlines()
    }
    assert found["launchers"] == ["ok", "torchrun,", "deepspeed,", "accelerate"]
    assert found["compiler"][0] == found["deepspeed"][0] == found["extras"][0] == "ok"

    # no name service in a container of buildah: the ranks meet at a number
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "29613"]
    model = ["--config", "configs/demo_base.yaml", "--log_dir", "runs/log"]
    steps = ["--train.max_steps", "6", "--train.optimizer", "sgd", "--log.storage", "update"]
    trained = buildah("run", container, "--", *torchrun, "launch/train.py", *model, *steps)
    assert "trained 6 steps on 2400 samples with 2 ranks" in trained

    ask = "import lmc_dist.trajectory.store as s; print(s.TrajectoryLog('runs/log').record(2).sample_ids[0])"
    sample = buildah("run", container, "--", "python3", "-c", ask).strip()
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", "29614", "launch/unlearn.py"]
    asked = ["--forget.samples", sample, "--output_dir", "runs/out", "--reference", "replay", "--progress", "none"]
    buildah("run", container, "--", *launch, *model, *asked)
    result = json.loads(buildah("run", container, "--", "cat", "runs/out/result.json"))
    assert 0 < result["rel_error"] < 0.1
