"""Tables of results, for a terminal and in Markdown."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def number(value: float | None, digits: int = 3) -> str:
    """`value` with about that many significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def filled(head: Sequence[str], rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def aligned(head: Sequence[str], rows: Rows, texts: int = 1) -> list[str]:
    """Lines with aligned columns: the first `texts` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def markdown(head: Sequence[str], rows: Rows, texts: int = 1) -> str:
    """The same as a Markdown table."""
    rule = ["---" if i < texts else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
