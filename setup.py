"""Packaging of lmc_dist: what it needs, its extras, and the `lmc` command.

`constraints.txt` holds the exact versions the project is developed and tested
with; the ranges here are what an installation into somebody's own environment
has to satisfy.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"

INSTALL_REQUIRES = [
    "torch>=2.12",  # before, FSDP2 keeps its groups elsewhere, and the oldest have no writer for snapshots
    "deepspeed>=0.16",
    "transformers>=4.56",
    "accelerate>=1.10",
    "safetensors>=0.5",
    "tokenizers",
    "datasets",
    "numpy",
    # dataclass options and their help texts: the `signatures` extra brings docstring-parser
    "jsonargparse[signatures]>=4.40",
    "pyyaml",
    "tqdm",
    # the trajectory log: compression and digests
    "xxhash",
    # the page of `lmc report`; torch brings it too
    "jinja2",
    # memory that is free
    "psutil",
    "zstandard",
    # torch's C++ extension loader, which DeepSpeed's JIT-built operators go through, imports it
    "setuptools",
]

# signatures of `lmc audit`
AUDIT = [
    "cryptography>=41",
]

# `lmc report`: pictures; so does `lmc log inspect --plot`
REPORT = [
    "matplotlib",
]

# `lmc evaluate`
EVALUATE = [
    "rouge-score",
    "scipy",
]

# tracking of runs; `lmc sweep` without it takes --wandb.project null, or WANDB_MODE=disabled
WANDB = [
    "wandb",
]

# `make docs`
DOCS = [
    "mkdocs-material",
    "mkdocstrings[python]",
]

EXTRAS_REQUIRE = {
    "audit": AUDIT,
    "evaluate": EVALUATE,
    "report": REPORT,
    "wandb": WANDB,
    "sweep": [*EVALUATE, *REPORT, *WANDB],
    "docs": DOCS,
    "dev": [
        *AUDIT,
        *EVALUATE,
        *REPORT,
        *WANDB,
        *DOCS,
        "scikit-learn",  # the area under the curve, for comparison
        "coverage>=7.17",
        "pytest",
        "pytest-timeout",
        "hypothesis",
        "peft",
        "ruff",
        "mypy",
        "types-PyYAML",
        "pre-commit",
        "build",
    ],
    # curvlinops-for-pytorch, which tests and benchmarks compare with, is not listed: it depends on torchvision (by way
    # of backpack-for-pytorch, which imports without it), and each torchvision requires one exact torch, so that a
    # resolver would replace the torch that is installed. `make peers` installs it without its dependencies, and
    # dp-accounting, which asks for an attrs below 24.
    "bench": REPORT,
}

setup(
    name="lmc_dist",
    version="0.1.0",
    description="Machine unlearning for language models trained with DeepSpeed ZeRO-3",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="lmc_dist authors",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["lmc_dist", "lmc_dist.*"]),
    package_data={"lmc_dist.report": ["page.html"], "lmc_dist.slurm": ["job.sbatch.jinja"]},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["lmc = lmc_dist.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
