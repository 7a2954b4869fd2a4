"""HTML and SVG from Python values: text is escaped unless it is Markup, so no prompt can become part of the page."""

import html


class Markup(str):
    """A string that is HTML already."""


def escape(value: object) -> Markup:
    """`value` as HTML: Markup as it is, lists joined, None as nothing, anything else escaped."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup()
    if isinstance(value, (list, tuple)):
        return Markup("".join(escape(item) for item in value))
    return Markup(html.escape(str(value).encode("utf-8", "backslashreplace").decode(), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """<name attributes>children</name>; class_ is class, aria_label is aria-label, None leaves an attribute out."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    text = "".join(f' {key}="{escape(value)}"' for key, value in pairs)
    return Markup(f"<{name}{text}>{escape(children)}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """An element without content, such as <img>."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def table(head: list, rows: list[list], **attributes: object) -> Markup:
    """A table whose first column names its rows, in a frame that scrolls by itself where it is too wide."""
    label = attributes.pop("label")
    header = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head]))
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    return scroller(tag("table", header, tag("tbody", body), **attributes), label)


def scroller(content: Markup, label: str) -> Markup:
    """A frame that scrolls sideways, by keyboard too."""
    return tag("div", content, class_="scroller", tabindex="0", role="region", aria_label=label)
