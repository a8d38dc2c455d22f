"""What a reproduction has finished, kept for the same command to go on from: a directory for each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from robustdice.errors import ModelError, OutputError
from robustdice.files import write_atomically
from robustdice.importance.score import score
from robustdice.importance.values import Importance
from robustdice.progress import Progress
from robustdice.report.comparison import Choices, Subject

_IN_WORDS = {
    "robustdice": "made by another version of robustdice",
    "model": "of a model of this name with another graph or other weights",
    "data": "from other images: --data, --imagenet, --samples or --scoring-data",
    "as_in_paper": "with or without --imagenet",
    "methods": "other --methods",
    "devices": "other --devices",
    "memory": "another --memory",
    "s3": "another --s3",
    "seed": "another --seed",
    "samples": "another number of frames: --samples",
    "megabits": "behind another switch: --link, or network namespaces were permitted, or not",
    "machine": "measured on another machine",
}
"""What a setting that differs says to whoever asked for it."""


def check_names(subjects: Sequence[Subject]) -> None:
    """ModelError when two models have the same name: each has a directory of that name."""
    names = [subject.name for subject in subjects]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ModelError(f"two models are called {twice.pop()!r}; rename a file, or run them one after the other")


def settings_of(subject: Subject, choices: Choices) -> dict[str, Any]:
    """Everything that a model's results depend on, as JSON has it."""
    memory = choices.memory_of(subject)
    # What is evaluated is known image by image in the checkpoints, so that one of them can be repaired.
    data = [subject.dataset.name, len(subject.dataset), subject.scoring.digest]
    settings = {
        "robustdice": version("robustdice"),
        "model": subject.network.reference.digest,
        "data": data,
        "as_in_paper": subject.as_in_paper,
        "methods": list(choices.methods),
        "devices": list(choices.devices),
        "memory": dict(memory) if isinstance(memory, Mapping) else memory,
        "s3": choices.s3,
        "seed": choices.seed,
    }
    return dict(json.loads(json.dumps(settings)))


def claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory of a model's finished work; OutputError when what it holds was made with other settings."""
    file = work / "settings.json"
    try:
        work.mkdir(parents=True, exist_ok=True)
        begun = any(path != file and not path.name.startswith(".") for path in work.iterdir())
        found = json.loads(file.read_bytes()) if begun and file.exists() else settings
    except OSError as error:
        raise OutputError(f"cannot write {work}: {error.strerror}; choose another place with -o") from None
    except ValueError:
        found = None
    if found != settings:
        raise OutputError(
            f"{work} holds results of other settings ({_differences(found, settings)}); give the settings that these "
            "were made with, choose another place with -o, or delete the directory to start again"
        )
    write_atomically(file, json.dumps(settings).encode())


def _differences(found: Any, settings: Mapping[str, Any]) -> str:
    """What was asked for otherwise, in the words of the command line."""
    if not isinstance(found, dict):
        return "its settings.json is damaged"
    keys = sorted(key for key in {*settings, *found} if found.get(key) != settings.get(key))
    return "; ".join(dict.fromkeys(_IN_WORDS.get(key, _IN_WORDS["robustdice"]) for key in keys))


def kept_scores(subject: Subject, work: Path, s3: str, scheduler: str | None, on_progress: Progress) -> Importance:
    """The model's scores, made unless they are there."""
    kept, partial = work / "scores.npz", work / "scores.partial"
    if kept.exists():
        scores = Importance.load(kept)
    else:
        scores = score(
            subject.network,
            subject.scoring,
            s3=s3,
            scheduler=scheduler,
            checkpoint=partial,
            on_progress=on_progress,
        )
        scores.save(kept)
    partial.unlink(missing_ok=True)
    return scores
