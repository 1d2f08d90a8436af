"""What a reader finds in a page of HTML: its elements, and the texts of its tables."""

from html.parser import HTMLParser

VOID = {"meta", "wbr", "link", "input", "br", "img"}


class ReportPage(HTMLParser):
    """`elements` as (tag, attributes), `tables` by caption as rows of cell texts, `text` as one line.

    Elements that are not closed in order raise an AssertionError.
    """

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.tables, self._open, self._words = [], {}, [], []
        self._caption = self._rows = self._cell = None
        self.feed(source)
        self.close()
        assert not self._open, f"not closed: {self._open}"
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td", "caption"):
            self._cell = []

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> within {self._open}"
        if tag == "caption":
            self._caption = self._take()
        elif tag in ("th", "td"):
            self._rows[-1].append(self._take())
        elif tag == "table":
            self.tables.setdefault(self._caption, []).append(self._rows)

    def handle_data(self, data):
        if "style" not in self._open:
            self._words.append(data)
            if self._cell is not None:
                self._cell.append(data)

    def _take(self):
        cell, self._cell = self._cell, None
        return " ".join(" ".join(cell).split())

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def table(self, column):
        """The first table with a column of this name, as one dictionary a row."""
        for tables in self.tables.values():
            for columns, *rows in tables:
                if column in columns:
                    return [dict(zip(columns, row, strict=True)) for row in rows]
        raise AssertionError(f"no table has a column {column!r}")
