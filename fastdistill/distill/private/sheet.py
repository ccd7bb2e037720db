"""The defence sheet: what a reviewer of the epsilons asks, on one page, generated from the run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from fastdistill.distill.private import accounting, plots
from fastdistill.distill.private.mechanism import Mechanism
from fastdistill.distill.private.results import histories

ADJACENCY = {
    "replace": "one record exchanged for any other of the same id. R3's sensitivity holds as well "
    "where one is added or removed",
    "zero_out": "one record's contribution becomes zero; the number of records, and with it the "
    "sampling rate and the expected batch, is public",
    "add_remove": "one record more or fewer",
}
TAIL = 3e-21  # of a coordinate's noise beyond what the generator reaches: `clip_and_noise`


def sheet(figures: dict[str, Any]) -> str:
    """The page, as Markdown."""
    runs = [run for run in figures["runs"] if run["mechanisms"]]
    data, settings, environment = figures["data"], figures["settings"], figures["environment"]
    shown = [run for run in runs if central(run, figures)]
    adjacencies = list(dict.fromkeys(run["adjacency"] for run in runs))
    tried = ", ".join(f"{name}: {count}" for name, count in figures["tried"].items())
    constants = ", ".join(f"{k} = {v}" for k, v in figures["public_constants"].items())
    secure = settings["noise"] == "secure"
    facts: list[tuple[str, str]] = [
        (
            "Claim",
            "each row's epsilon is for one student of that row, released alone. Two students, or "
            "the table as a whole, compose: their mechanisms are listed to be added up.",
        ),
        ("Unit", f"{figures['unit']}; a person with several records is protected for each alone."),
        ("Adjacency", "; ".join(f"`{name}`: {ADJACENCY[name]}" for name in adjacencies) + "."),
        (
            "Data set",
            f"{data['name']}, sha256 `{data['sha256']}`: {data['private_images']:,} private "
            f"records, {data['public_images']:,} public images ({data['public_labels']} with a "
            f"label), {data['test_images']:,} to test. A record's id is its number in the source.",
        ),
        (
            "Public constants",
            f"{constants}; the split, by number and seed; the filters, learnt from public images.",
        ),
        (
            "Accountant",
            f"Opacus {environment['opacus']} (RDP; PRV for schedules fixed in advance), and exact "
            "Gaussian composition where nothing is sampled.",
        ),
        ("Cross-check", "; ".join(cross_checks(shown)) + "."),
        (
            "Noise",
            "ChaCha20 keyed by the operating system at process start; batches from the operating "
            "system's generator."
            if secure
            else "Philox from the seed, REPRODUCIBLE: NOT FOR RELEASE (`noise: secure` is).",
        ),
        (
            "Floating point",
            "records' contributions and sums are exact multiples of a public grid, the grid is "
            "paid for out of the sensitivity, and the noise is rounded to the same grid; "
            f"{TAIL:g} per coordinate and release is to be added to delta for the tail.",
        ),
        (
            "Tuning",
            f"settings tried ({tried}), all on public images alone, then fixed for every row, "
            "epsilon and seed. Test accuracies chose none of these numbers; the approach (public "
            "features, linear classifiers) was chosen with a look at them.",
        ),
        (
            "Not protected",
            "run times, the logs of this job, accuracies if the test images were private, the "
            "rows non_private and as_released, the file `.secret`, raw teachers in memory; that "
            "a record exists where its id is public.",
        ),
    ]
    table = ["| Row | Mechanisms | epsilon | delta |", "|---|---|--:|--:|"]
    table += [
        f"| {run['name']} | {'; '.join(_words(m) for m in run['mechanisms'])} | "
        f"{run['epsilon']:.3f} | {run['delta']:g} |"
        for run in shown
    ]
    lines = [
        "# Defence sheet",
        "",
        *(f"- **{name}.** {text}" for name, text in facts),
        "",
        *table,
        "",
        "The other rows' mechanisms are in results.json, in the same form.",
        "",
    ]
    return "\n".join(lines)


def central(run: dict[str, Any], figures: dict[str, Any]) -> bool:
    """Whether the row is R1, R2, the gradient ablation, or the central one of R3."""
    middle = plots.central(figures)
    return run["recipe"] != "R3" or (
        run["strategy"] == "random" and all(run[key] == middle[key] for key in middle)
    )


def _words(mechanism: dict[str, Any]) -> str:
    rate = mechanism["sampling_rate"]
    return (
        f"{mechanism['name']} on {mechanism['dataset_id']}: Gaussian, noise "
        f"{mechanism['noise_std']:.5g} on sensitivity {mechanism['sensitivity']:.5g}, "
        + ("" if rate is None else f"Poisson {rate:g}, ")
        + f"{mechanism['releases']} x {mechanism['steps']}"
    )


def cross_checks(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Epsilon of each row's histories by the other accountants, and by dp-accounting if there."""
    found = []
    for run in runs:
        groups = histories(run)
        others = {
            name: max(accounting.epsilon(part, run["delta"], name) for part in groups)
            for name in ("rdp", "prv")
        }
        text = ", ".join(f"{name.upper()} {value:.3f}" for name, value in others.items())
        theirs = _dp_accounting(groups, run["delta"])
        found.append(
            f"{run['name']} {run['epsilon']:.3f} ({run['accountant']}): {text}, dp-accounting's "
            + ("PLD: not installed" if theirs is None else f"PLD {theirs:.3f}")
        )
    return found


def _dp_accounting(groups: Iterable[list[Mechanism]], delta: float) -> float | None:
    if importlib.util.find_spec("dp_accounting") is None:
        return None
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    worst = 0.0
    for history in groups:
        judge = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for m in history:
            event = dp_accounting.GaussianDpEvent(m.multiplier)
            if m.sampling_rate is not None:
                event = dp_accounting.PoissonSampledDpEvent(m.sampling_rate, event)
            judge.compose(event, m.steps)
        worst = max(worst, float(judge.get_epsilon(delta)))
    return worst
