"""Put the recorded tables into README.md, and draw the figure."""

from pathlib import Path
from typing import Any

from benchmarks.figure import draw_stall
from benchmarks.results import recorded

README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"


def report(names: list[str]) -> None:
    """Write what is recorded of these benchmarks, in this order, between the markers of README.md."""
    sections = []
    for name in names:
        found = recorded(name)
        if found is not None:
            result, machine = found
            sections.append(f"### {name.replace('_', ' ').capitalize()}\n\n{result.markdown()}\n{_machine(machine)}\n")
    draw_stall()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    tables = "\n".join(sections)
    README.write_text(f"{before}{_BEGIN}\n\n{tables}\n{_END}{after}", encoding="utf-8")


def _machine(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"*{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['filesystem']}; "
        f"Python {machine['python']}, {packages}; {machine['date']}.*\n"
    )
