"""Charts: what is drawn is what was given, the same each time, on a ground of its own; and what goes wrong is said."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from stemcache.api import cli
from stemcache.api.charts import Bar, ChartError, Lines, draw_bars, draw_dots, draw_lines, require_charts
from stemcache.ragcache.errors import MissingExtraError

SVG = "{http://www.w3.org/2000/svg}"
BARS = {"k=2 & <drift>": [Bar("lru", 0.25, 0.2, 0.3, "0.250"), Bar("pgdsf", 0.5, 0.5, 0.5, "0.500")]}
GROWTH = Lines("One step", "sequences", "microseconds", {"schedule": [(1, 3.0), (1000, 9.5)], "plan": [(1, 0.02)]})

Draw = Callable[[Path], None]
CHARTS: dict[str, Draw] = {
    "bars": lambda path: draw_bars(BARS | {"another": [Bar("lru", 0.0, 0.0, 0.0, "none")]}, path),
    "dots": lambda path: draw_dots("Times", "tokens", "milliseconds", [(0, 3.5), (40, 80.0)], path),
    "lines": lambda path: draw_lines([GROWTH, GROWTH], path),
}


def texts(path: Path) -> set[str]:
    return {"".join(each.itertext()) for each in ElementTree.parse(path).getroot().iter(f"{SVG}text")}


@pytest.mark.parametrize("name", CHARTS)
def test_the_same_figures_make_the_same_file(tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        CHARTS[name](path)
    assert first.read_bytes() == second.read_bytes()
    assert b"date" not in first.read_bytes().lower()


@pytest.mark.parametrize("name", CHARTS)
def test_it_has_a_ground_of_its_own(tmp_path: Path, name: str) -> None:
    """Black on a dark viewer's nothing could not be read."""
    from matplotlib.image import imread

    CHARTS[name](tmp_path / "chart.png")
    pixels = imread(tmp_path / "chart.png")
    assert pixels[..., 3].min() == 1
    assert pixels[0, 0, :3].tolist() == [1, 1, 1]
    CHARTS[name](tmp_path / "chart.svg")
    ground = ElementTree.parse(tmp_path / "chart.svg").getroot().find(f".//{SVG}g[@id='patch_1']/{SVG}path")
    assert ground is not None
    assert "fill: #ffffff" in ground.attrib["style"]


def test_bars_are_as_long_as_their_figures(tmp_path: Path) -> None:
    path = tmp_path / "bars.svg"
    draw_bars(BARS, path)
    assert {"k=2 & <drift>", "lru", "pgdsf", "0.250", "0.500"} <= texts(path)
    lengths = []
    for number in (3, 4):  # after the grounds of the figure and the axes
        bar = ElementTree.parse(path).getroot().find(f".//{SVG}g[@id='patch_{number}']/{SVG}path")
        assert bar is not None
        xs = [float(word) for word in bar.attrib["d"].replace("M", "").replace("L", "").replace("z", "").split()[::2]]
        lengths.append(max(xs) - min(xs))
    assert lengths[1] == pytest.approx(2 * lengths[0])


def test_lines_are_named(tmp_path: Path) -> None:
    draw_lines([GROWTH], tmp_path / "lines.svg")
    assert {"One step", "sequences", "microseconds", "schedule", "plan", "1,000"} <= texts(tmp_path / "lines.svg")


@pytest.mark.parametrize("points", [[], [(0, 0.0)], [(1, 1e-3), (10**6, 900_000.0)]])
def test_any_points_make_a_chart(tmp_path: Path, points: list[tuple[int, float]]) -> None:
    draw_dots("Times", "tokens", "milliseconds", points, tmp_path / "dots.svg")
    drawn = ElementTree.parse(tmp_path / "dots.svg").getroot().find(f".//{SVG}g[@id='PathCollection_1']")
    assert (0 if drawn is None else len(drawn.findall(f".//{SVG}use"))) == len(points)


def test_nothing_of_matplotlibs_is_left_behind() -> None:
    """No pyplot, no changed setting, and no matplotlib at all until a chart is drawn."""
    program = """if True:
        import sys, pathlib, tempfile
        from stemcache.api import charts, simulate, bench
        assert "matplotlib" not in sys.modules
        import matplotlib
        names = set(matplotlib.rcParams) - {"backend"}  # to read that one imports pyplot
        before = {name: matplotlib.rcParams[name] for name in names}
        with tempfile.TemporaryDirectory() as folder:
            charts.draw_dots("", "", "", [(1, 1)], pathlib.Path(folder) / "chart.svg")
        assert {name: matplotlib.rcParams[name] for name in names} == before
        assert "matplotlib.pyplot" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


@pytest.mark.parametrize("name", ["chart.jpg", "chart", "chart.svg.txt"])
def test_another_suffix_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for command in (["simulate"], ["bench", "--url", "http://127.0.0.1:1"]):
        assert cli.main([*command, "--chart", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.endswith(
            f"a chart is written as .svg or .png, and {name!r} is neither: name the file so\n"
        )
    with pytest.raises(ChartError):
        draw_bars(BARS, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    require_charts(tmp_path / "chart.PNG")


def test_without_matplotlib_it_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert cli.main(["simulate", "--chart", str(tmp_path / "chart.svg")]) == 2
    assert "matplotlib is not installed; run: pip install 'stemcache[charts]'" in capsys.readouterr().err
    with pytest.raises(MissingExtraError):
        CHARTS["dots"](tmp_path / "chart.svg")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CHARTS["dots"](tmp_path / "nowhere" / "chart.svg")
