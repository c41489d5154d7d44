"""The table of sizes in docs/image.md against the committed measurements."""

from __future__ import annotations

import image_sizes


def test_the_page_has_the_table_of_what_was_measured() -> None:
    figures = image_sizes.figures()
    assert [figure["cuda"] for figure in figures] == ["13.0", "12.8"]
    for figure in figures:
        for column, name in enumerate(("unpacked", "compressed")):
            assert sum(size[column] for size in figure["parts"].values()) == figure[name]
        assert not figure["image"]["dirty"]
    wanted = f"{image_sizes.BEGIN}\n{image_sizes.table(figures)}\n{image_sizes.END}\n"
    assert wanted in image_sizes.PAGE.read_text()
