"""Draw results/stall.png from what the stall benchmark recorded."""

from itertools import product

from benchmarks.results import RESULTS, recorded
from benchmarks.roster import FLOOR, OURS

_COLORS = ("#9ecae1", "#3182bd")  # of the small and the large state
_OURS = ("#fdae6b", "#e6550d")
_GREY = "#444444"


def draw_stall() -> None:
    """Bars for every saver and size: stall as a multiple of memcpy. Draws nothing if nothing is recorded."""
    found = recorded("stall")
    if found is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    by_size = found[0].measurements
    stalls = [measured["stall_over_memcpy"] for measured in by_size.values()]
    added = [measured["added_over_memcpy"] for measured in by_size.values()]
    names = sorted(
        {name for stall in stalls for name in stall if name != FLOOR.name},
        key=lambda name: max(stall.get(name, 0.0) for stall in stalls),
    )
    height = 0.8 / len(stalls)

    figure, axes = plt.subplots(figsize=(9, 0.55 * len(names) + 1.6), layout="constrained")
    for (index, stall), (row, name) in product(enumerate(stalls), enumerate(names)):
        if name not in stall:
            continue
        y = row + (index - (len(stalls) - 1) / 2) * height
        axes.barh(y, stall[name], height=height * 0.92, color=(_OURS if name == OURS.name else _COLORS)[index])
        with_step, text = added[index][name], f"{stall[name]:.2g}"
        if with_step > 0:  # where next to nothing is added, noise may take it below
            axes.plot(with_step, y, marker="D", markersize=4, color=_GREY, markerfacecolor="white")
            text += f" → {with_step:.2g}"
        axes.text(max(stall[name], with_step) * 1.12, y, text, va="center", fontsize=8, color=_GREY)
    axes.axvline(1, color=_GREY, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        if label.get_text() == OURS.name:
            label.set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high * 2]
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_xlim(right=high * 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time that a checkpoint holds up training, in copies of the state (memcpy = 1); log scale")
    keys = [Patch(color=color, label=f"stall, {size}") for color, size in zip(_COLORS, by_size, strict=False)]
    diamond = Line2D([], [], marker="D", markersize=4, color=_GREY, markerfacecolor="white", linestyle="")
    diamond.set_label("with what it adds to the next step")
    figure.legend(handles=[*keys, diamond], frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(RESULTS / "stall.png", dpi=130)
    plt.close(figure)
