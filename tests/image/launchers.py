"""Stands where docker, podman, srun or apptainer stand in a block of docs/platforms.md, and starts what the block asks for in the
real engine. It changes as little as it can: there is no GPU here and no network, and the model is a tiny one.

From the environment: ENGINE (the real client), TAG (the image under test), OPTIONS (JSON: more options of `docker run`), and
VERB, which takes the place of `train` where a block is not to train.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

STRANGER = ["--user", "12345:23456", "-e", "HOME=/home/stranger"]
WITHOUT = {
    "--gpus": 2,
    "--device": 2,
    "--userns": 2,
    "--nv": 1,
    "--cleanenv": 1,
    "--no-home": 1,
}  # words with their value


def taken_out(words: list[str]) -> list[str]:
    kept: list[str] = []
    skip = 0
    for word in words:
        skip = skip or WITHOUT.get(word, 0)
        if not skip:
            kept.append(word.removesuffix(":Z"))
        skip = max(0, skip - 1)
    return kept


def run_words(program: str, words: list[str]) -> list[str]:
    """The words of `docker run` for what `program` was asked to do."""
    words = taken_out(words)
    if program in ("docker", "podman"):
        assert words[0] == "run", words
        return words[1:]
    options: list[str] = [*STRANGER]
    if program == "apptainer":
        assert words[0] == "run", words
        words = words[1:]
        options += ["--read-only", "--tmpfs", "/tmp:mode=1777,exec"]
    else:
        options += ["--entrypoint", "", "-w", "/nowhere"]
    while words and words[0].startswith("--"):
        name, given, value = words.pop(0).partition("=")
        value = value if given else words.pop(0)
        if name in ("--bind", "--container-mounts"):
            options += [word for mount in value.split(",") for word in ("-v", mount)]
        elif name in ("--pwd", "--container-workdir"):
            options += ["-w", value]
        else:
            assert name == "--container-image", name
    image = [os.environ["TAG"]] if program == "srun" else []
    return [*options, *image, *(os.environ["TAG"] if word.endswith(".sif") else word for word in words)]


def main() -> None:
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    if words[0] in ("pull", "compose"):
        print(json.dumps(words))
        return
    words = run_words(program, words)
    if verb := os.environ.get("VERB"):
        words = [verb if word == "train" else word for word in words]
    engine = os.environ["ENGINE"]
    os.execv(
        engine,
        [engine, "run", "--rm", "--pull", "never", "--network", "none", *json.loads(os.environ["OPTIONS"]), *words],
    )


if __name__ == "__main__":
    main()
