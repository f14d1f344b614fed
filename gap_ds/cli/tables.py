"""Tables and timelines of figures, for terminals of any width. K partitions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gap_ds.storage.errors import printable

#: With more phases, the table shows only the first and the last ones; the timeline shows all.
_MAX_PHASES = 24
_SHOWN = (12, 8)
_LABEL = 4  # columns left of the timeline
_MAX_PROBLEMS = 20


def plan(console: Console, name: str, figures: dict[str, Any]) -> None:
    """Print the figures of `gap-ds plan`."""
    model = figures["model"]
    console.print(Text(figures["signature"], style="dim"), soft_wrap=True)
    counts = f"{model['weights']:,} weights, {figures['weights']:,} prunable"
    console.print(Text.assemble((name, "bold"), f": {model['class']}, {counts}"), soft_wrap=True)
    _section(console, "Partitions", _partitions(figures))
    if "entries" in figures:
        _section(console, "Entries", _entries(figures["entries"]))
    _section(console, _phases_title(figures), _phases(figures))
    _section(console, "Timeline", _timeline(figures, console.width, console.options.ascii_only))
    _section(console, "The whole run", _summary(figures))
    if "ranks" in figures:
        ranks = figures["ranks"]["world_size"]
        _section(console, f"On each of {ranks:,} ranks" if ranks > 1 else "On one rank", _ranks(figures["ranks"]))


def doctor(console: Console, report: dict[str, Any]) -> None:
    """Print the facts and findings of `gap-ds doctor`."""
    facts = _grid()
    facts.add_row("gap_ds", report["gap_ds"])
    facts.add_row("Python", f"{report['python']}, {report['system']}, {report['cores']} CPU cores")
    for package in ("torch", "deepspeed", "transformers", "fairscale", "accelerate"):
        facts.add_row(package, report["packages"].get(package, "not installed"))
    facts.add_row("accelerators", ", ".join(report["accelerators"]) or "none")
    facts.add_row("launchers", ", ".join(report["launchers"]) or "none")
    facts.add_row("C++ compiler", report["compiler"] or "none")
    console.print(facts)
    table = _table(("works here", "left"), ("", "left"), ("why, or what to do", "left"))
    styles = {"yes": "green", "limited": "yellow", "no": "red"}
    for finding in report["findings"]:
        table.add_row(finding["what"], Text(finding["works"], styles[finding["works"]]), finding["why"])
    console.print()
    console.print(table)


def inspection(console: Console, figures: dict[str, Any], with_entries: bool) -> None:
    """Print the figures and problems of `gap-ds inspect`."""
    console.print(Text(printable(figures["signature"], None), style="dim"), soft_wrap=True)
    of = _of_export(figures) if figures["kind"] == "export" else _of_checkpoint(figures)
    console.print(Text(printable(figures["path"], None), style="bold"), soft_wrap=True)
    console.print(Text(of))
    if figures["partitions"]:
        _section(console, "Partitions", _counted(figures))
    if with_entries:
        _section(console, "Entries", _counted_entries(figures))
    for note in figures["notes"]:
        console.print()
        console.print(Text(f"Note: {note}."))
    problems = figures["problems"]
    console.print()
    if not problems:
        console.print(Text("Nothing wrong was found.", style="green"))
        return
    console.print(
        Text("One thing is wrong" if len(problems) == 1 else f"{len(problems):,} things are wrong", style="red")
    )
    for problem in problems[:_MAX_PROBLEMS]:
        console.print(Text(f"  {printable(problem, None)}"), soft_wrap=True)
    if len(problems) > _MAX_PROBLEMS:
        console.print(Text(f"  and {len(problems) - _MAX_PROBLEMS:,} more: see --json"))


def report(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of each run of `gap-ds report`, and the path of the page."""
    columns = [(heading, "right") for heading in ("steps", "density", "FLOPs", "loss", *figures["scores"].values())]
    table = _table(("run", "left"), *columns)
    for run in figures["runs"]:
        steps = "" if run["steps"] is None else f"{run['steps']:,}"
        density = "" if run["density_at_end"] is None else f"{run['density_at_end']:.4f}"
        flops = "" if run["training_flops"] is None else f"{run['training_flops']:.2f}"
        loss = "" if run["validation_loss"] is None else f"{run['validation_loss']:.3f}"
        scores = (f"{run['scores'][name]:.2f}" if name in run["scores"] else "" for name in figures["scores"])
        table.add_row(printable(run["name"], None), steps, density, flops, loss, *scores)
    console.print(table)
    missing: dict[str, list[str]] = {}
    for run in figures["runs"]:
        for text in run["missing"]:
            missing.setdefault(text, []).append(printable(run["name"], None))
    if missing:
        grid = _grid()
        for text, names in missing.items():
            is_all = len(names) == len(figures["runs"]) > 1
            grid.add_row("all" if is_all else "\n".join(names), printable(text, None))
        _section(console, "Not shown", grid)
    console.print()
    pictures = len(figures["pictures"])
    console.print(Text(f"{figures['page']} ({pictures} pictures, which lie beside it, too)"), soft_wrap=True)


def size(count: float) -> str:
    """Return a number of bytes with its unit.

    >>> size(0), size(1023), size(1536), size(5 * 2**30)
    ('0 B', '1023 B', '1.50 KiB', '5.00 GiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{count:.2f} {units[0]}"


def abbreviate(blocks: Sequence[str]) -> list[str]:
    """Return block names with their numbers joined to ranges.

    >>> abbreviate(["h.0", "h.1", "h.2", "h.5", "decoder.0", "fc"])
    ['h.0-2,5', 'decoder.0', 'fc']
    """
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        match = re.fullmatch(r"(.*?)\.?(\d+)", block)
        stacks.setdefault(match[1] if match else block, []).extend([int(match[2])] if match else [])
    return [f"{stack}.{_runs(numbers)}".lstrip(".") if numbers else stack for stack, numbers in stacks.items()]


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _section(console: Console, title: str, body: RenderableType) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    console.print(body)


def _table(*columns: tuple[str, str]) -> Table:
    """Return an empty table; a column is (heading, side to align to)."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _partitions(figures: dict[str, Any]) -> Table:
    right = [(heading, "right") for heading in ("entries", "weights", "kept", "share")]
    table = _table(("", "right"), ("blocks", "left"), *right)
    for row in figures["partitions"]:
        split = set(row["split_blocks"])
        blocks = abbreviate([block for block in row["blocks"] if block not in split])
        blocks += [f"part of {block}" for block in abbreviate([b for b in row["blocks"] if b in split])]
        counts = (f"{row[key]:,}" for key in ("entries", "weights", "kept"))
        table.add_row(str(row["partition"]), "\n".join(blocks), *counts, f"{row['share']:.1%}")
    entries = sum(row["entries"] for row in figures["partitions"])
    table.add_section()
    table.add_row("", "all", f"{entries:,}", f"{figures['weights']:,}", f"{figures['kept']:,}", "100.0%")
    return table


def _entries(entries: Sequence[dict[str, Any]]) -> Table:
    """Return a row for each entry; the experts of a block that are in one partition are one row."""
    table = _table(("", "right"), ("entry", "left"), ("shape", "right"), ("kept", "right"), ("density", "right"))
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in entries:
        name = entry["experts"]["module"] if "experts" in entry else entry["name"]
        groups.setdefault((entry["partition"], name), []).append(entry)
    for (partition, module), rows in groups.items():
        name, shape = rows[0]["name"], " x ".join(map(str, rows[0]["shape"]))
        if len(rows) > 1:
            name, number = f"{module}.*", _number(rows)
            if ":" in (rows_of_all := rows[0]["experts"]["expert"]):
                name = f"{module}[{rows_of_all}]"
            shape = "1 expert" if number == 1 else f"{number} experts"
        kept, weights = (sum(row[key] for row in rows) for key in ("kept", "weights"))
        table.add_row(str(partition), name, shape, f"{kept:,}", f"{kept / weights:.4f}")
    return table


def _number(entries: Sequence[dict[str, Any]]) -> int:
    """Return how many experts of one block some of its entries are of: of one each, of some rows, or of all."""
    found: set[str] = set()
    for row in (entry["experts"] for entry in entries):
        lo, _, hi = row["expert"].partition(":")
        all_of_them = range(row["number"]) if not lo else range(int(lo), int(hi)) if hi else [lo]
        found.update(map(str, all_of_them))
    return len(found)


def _phases_title(figures: dict[str, Any]) -> str:
    title = f"Phases: {len(figures['phases'])} in {figures['length']:,} {figures['unit']}s"
    return title + (f", {figures['steps_per_epoch']:,} steps in an epoch" if figures["steps_per_epoch"] else "")


def _phases(figures: dict[str, Any]) -> Table:
    unit, phases = figures["unit"], figures["phases"]
    columns = [(heading, "right") for heading in ("phase", "round", f"first {unit}", f"{unit}s")]
    table = _table(*columns, ("dense partitions", "left"), ("density", "right"))
    first, last = _SHOWN if len(phases) > _MAX_PHASES else (len(phases), 0)
    for phase in phases[:first]:
        table.add_row(*_phase(phase, unit))
    if left_out := phases[first : len(phases) - last]:
        table.add_row("...", "", "", "", f"{len(left_out)} more, see the timeline", "")
    for phase in phases[len(phases) - last :] if last else ():
        table.add_row(*_phase(phase, unit))
    return table


def _phase(phase: dict[str, Any], unit: str) -> tuple[str, ...]:
    is_last = phase["kind"] == "finetune"
    dense = ", ".join(map(str, phase["dense"])) or ("none (fine-tuning)" if is_last else "none")
    if phase["updates"]:
        dense += f" ({'pruned in' if phase['dense'] else 'masks move in'} {phase['updates']:,} updates)"
    first, length = phase[f"first_{unit}"], phase[f"{unit}s"]
    round_ = "" if is_last else str(phase["round"])
    return str(phase["phase"]), round_, f"{first:,}", f"{length:,}", dense, f"{phase['density']:.4f}"


def _timeline(figures: dict[str, Any], width: int, ascii_only: bool) -> Text:
    """Return a line for each partition that shows when it is dense, to scale if every phase gets a column."""
    unit, phases = figures["unit"], figures["phases"]
    width = max(20, min(width, 100) - _LABEL - 1)
    starts = [phase[f"first_{unit}"] for phase in phases] + [figures["length"]]
    columns = [round(width * start / figures["length"]) for start in starts]
    widths = [end - start for start, end in itertools.pairwise(columns)]
    is_to_scale = all(w > 0 for w, phase in zip(widths, phases, strict=True) if phase[f"{unit}s"])
    if not is_to_scale:
        widths = [int(phase[f"{unit}s"] > 0) for phase in phases]
        per_round = sum(phase["round"] == 0 for phase in phases)
        width -= width % per_round if per_round < width else 0  # rounds are not broken across lines
    full, *between, empty = list("#+=-." if ascii_only else "█▓▒░·")
    lines = [
        "".join(
            _shade(phase, k, row["kept"] / row["weights"], (full, *between, empty)) * w
            for phase, w in zip(phases, widths, strict=True)
        )
        for k, row in enumerate(figures["partitions"])
    ]
    marks = _marks(phases, widths)
    scale = "to scale" if is_to_scale else "a column per phase"
    whose = "; of worker 0 (worker I has partition I dense)" if "workers" in figures else ""
    shades = f"{''.join(between)} between, " if any("first_density" in phase for phase in phases) else ""
    text = Text(f"{full} dense, {shades}{empty} sparse, r round, ft fine-tuning; {scale}{whose}\n")
    for start in range(0, sum(widths), width):
        end = start + width if start + width < sum(widths) else len(marks)
        text.append(f"{'':{_LABEL}}{marks[start:end].rstrip()}\n", style="dim")
        for k, line in enumerate(lines):
            text.append(f"{k:>{_LABEL - 1}} {line[start : start + width]}\n")
    text.rstrip()
    return text


def _shade(phase: dict[str, Any], k: int, final: float, shades: Sequence[str]) -> str:
    """Return the character of a partition in a phase: the first is for dense, the last for its final density."""
    if "first_density" not in phase:
        return shades[0] if k in phase["dense"] else shades[-1]
    above = (phase["first_density"][k] - final) / (1 - final) if final < 1 else 0.0
    return shades[next((i for i, least in enumerate((1.0, 0.6, 0.25, 0.02)) if above >= least), len(shades) - 1)]


def _marks(phases: Sequence[dict[str, Any]], widths: Sequence[int]) -> str:
    """Return the line above the timeline: the beginnings of rounds and of fine-tuning that there is room for."""
    line, position, seen = "", 0, set()
    for phase, w in zip(phases, widths, strict=True):
        mark = "ft" if phase["kind"] == "finetune" else f"r{phase['round']}"
        if w and mark not in seen and (not line or len(line) < position):
            line = line.ljust(position) + mark
        seen.add(mark)
        position += w
    return line.ljust(position)


def _summary(figures: dict[str, Any]) -> Table:
    grid = _grid()
    of_model = figures["model"]["weights"]
    pruned = figures["weights"] - figures["kept"]
    grid.add_row("sparsity of the entries", f"{figures['entry_sparsity']:.2%}: {pruned:,} of {figures['weights']:,}")
    grid.add_row("sparsity of the whole model", f"{figures['model_sparsity']:.2%}: {pruned:,} of {of_model:,}")
    grid.add_row("mean density of the entries", f"{figures['mean_density']:.4f} over all {figures['unit']}s")
    counted = figures["training_flops_counted"]
    grid.add_row("training FLOPs", f"{figures['training_flops']:.4f} of dense training (counted: {counted})")
    held = {key: size(number) for key, number in figures["optimizer_state"].items()}
    grid.add_row("AdamW's state", f"{held['whole']} in fp32, over all ranks")
    kept = f"{held['mean']} on average, at most {held['most']}, {held['last']} in the last phase"
    grid.add_row("", f"with gap_ds.optim.AdamW {kept}")
    if last := figures.get("last_values"):
        held = {key: size(number) for key, number in last.items()}
        kept = f"{held['mean']} on average, at most {held['most']}, {held['last']} in the last phase"
        grid.add_row("values of pruned weights", f"{kept}, over all ranks")
    if longest := figures.get("longest_steps"):
        grid.add_row("steps", f"up to {longest:.1f} times as long as the learning rate's (lr_density_power)")
    if workers := figures.get("workers"):
        n, least, most = workers["workers"], min(workers["exchange_bytes"]), max(workers["exchange_bytes"])
        grid.add_row("", f"{workers['training_flops']:.4f} by all {n} workers together; the line above is for worker 0")
        sizes = size(least) if least == most else f"{size(least)} to {size(most)}"
        grid.add_row(
            "exchanged", f"{sizes} a worker at the end of each round, besides norms, biases and shared weights"
        )
    return grid


def _ranks(ranks: dict[str, Any]) -> Table:
    grid = _grid()
    if ranks["world_size"] == 1:
        grid.add_row("masks", size(ranks["mask_bytes"]))
        return grid
    grid.add_row("masks", f"{size(ranks['mask_bytes'])}, if each entry is split (ZeRO-3, FSDP)")
    grid.add_row("", f"at most {size(ranks['mask_bytes_flat_buffer'])}, if a flat buffer is split (ZeRO-1, -2)")
    grid.add_row("", f"{size(ranks['mask_bytes_unsharded'])}, if each rank has all weights (DDP, ZeRO-0)")
    grid.add_row("sent at a boundary", f"at most {size(ranks['boundary_bytes'])} of {ranks['sent']}, all-reduced")
    if "update_bytes" in ranks:
        grid.add_row("sent at an update", f"at most {size(ranks['update_bytes'])} of {ranks['sent']}, all-reduced")
    grid.add_row("sent at the start", f"{size(ranks['start_bytes'])} of {ranks['sent']}, all-reduced")
    return grid


def _of_export(figures: dict[str, Any]) -> str:
    model = figures["model"]
    dtypes = ", ".join(sorted(figures["dtypes"]))
    files = "1 file" if figures["files"] == 1 else f"{figures['files']:,} files"
    return (
        f"An export after step {figures['applied_steps']:,}, {model['weights']:,} weights, {model['nonzero']:,} of "
        f"them not zero; {figures['tensors']:,} tensors of {dtypes}, {size(figures['bytes'])} in {files}."
    )


def _of_checkpoint(figures: dict[str, Any]) -> str:
    phase, ranks = figures["phase"], figures["ranks"]
    where = f"phase {phase['phase']}"
    steps = f"{figures['applied_steps']:,}"
    if "kind" in phase:
        dense = ", ".join(map(str, phase["dense"])) or "none"
        where += f" ({phase['kind']}, round {phase['round']}, dense {dense})"
        steps += f" of {phase['total_steps']:,}"
    worker = "" if figures["worker"] is None else f", worker {figures['worker']}"
    backend = printable(figures["backend"], None)
    return f"A checkpoint after step {steps}, in {where}; {backend}, {ranks:,} rank{'s' * (ranks > 1)}{worker}."


def _counted(figures: dict[str, Any]) -> Table:
    """Return the counts of each partition: `kept` is counted, `budget` is planned."""
    counted = "nonzero" if figures["kind"] == "export" else "kept"
    right = [(heading, "right") for heading in ("entries", "weights", "budget", counted, "density")]
    table = _table(("", "right"), *right, ("", "left"))
    rows = figures["partitions"]
    for row in rows:
        name = "?" if row["partition"] is None else str(row["partition"])
        table.add_row(name, *_counts(row, counted), "dense now" if row.get("dense") == row["entries"] else "")
    if len(rows) > 1:
        total = {key: sum(row[key] for row in rows) for key in ("entries", "weights", "keep", counted)}
        table.add_section()
        table.add_row("all", *_counts(total, counted))
    return table


def _counts(row: dict[str, Any], counted: str) -> list[str]:
    numbers = ["?" if row[key] is None else f"{row[key]:,}" for key in ("entries", "weights", "keep", counted)]
    return [*numbers, f"{row[counted] / row['weights']:.4f}" if row["weights"] else "?"]


def _counted_entries(figures: dict[str, Any]) -> Table:
    counted = "nonzero" if figures["kind"] == "export" else "kept"
    right = [(heading, "right") for heading in ("weights", "budget", counted, "density")]
    table = _table(("", "right"), ("entry", "left"), *right)
    for name, row in figures["entries"].items():
        partition = "?" if row["partition"] is None else str(row["partition"])
        table.add_row(partition, printable(name, None), *_counts({"entries": 1, **row}, counted)[1:])
    return table
