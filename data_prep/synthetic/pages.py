"""Random web pages: headings, lists, tables, forms, cards and buttons in several styles."""

import random

from data_prep.synthetic.topics import CITIES, DEPARTMENTS, GOODS, PEOPLE

FONTS = ("sans-serif", "serif", "monospace")
ACCENTS = ("#1f6feb", "#0a7f5a", "#9a3412", "#6d28d9", "#334155")
SENTENCES = (
    "Orders before noon are sent the same day.",
    "The office in {city} is closed on public holidays.",
    "Ask {person} if anything is missing.",
    "{goods} can be returned within thirty days.",
    "Every item is checked by hand before it leaves the house.",
    "New {goods} arrive each Monday.",
    "Our team in {city} answers within a day.",
    "The list is kept by {department}.",
)


def random_page(rng: random.Random) -> str:
    """A page of three to six parts, as HTML with its style."""
    accent, family, size = rng.choice(ACCENTS), rng.choice(FONTS), rng.choice((14, 15, 16))
    style = (
        f"body{{font:{size}px/1.5 {family};margin:24px;color:#222}} h1,h2{{color:{accent}}} a{{color:{accent}}} "
        f"table{{border-collapse:collapse}} td,th{{border:1px solid #bbb;padding:4px 10px;text-align:left}} "
        f"button{{background:{accent};color:#fff;border:0;border-radius:4px;padding:6px 14px;font:inherit}} "
        f".card{{border:1px solid #ccc;border-radius:6px;padding:8px 14px;margin:10px 0}} input,select{{font:inherit}} "
        f"nav a{{margin-right:16px}} label{{margin-right:8px}} .row{{margin:8px 0}}"
    )
    parts = rng.sample((_paragraphs, _list, _table, _form, _cards, _buttons), rng.randint(3, 5))
    body = "\n".join(part(rng) for part in (_header, *parts))
    return f"<!DOCTYPE html>\n<html><head><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"


def _header(rng: random.Random) -> str:
    links = "".join(f'<a href="#">{name}</a>' for name in rng.sample(("Home", *DEPARTMENTS), rng.randint(3, 5)))
    return f"<nav>{links}</nav>\n<h1>{rng.choice(GOODS)} in {rng.choice(CITIES)}</h1>"


def _sentence(rng: random.Random) -> str:
    return rng.choice(SENTENCES).format(
        city=rng.choice(CITIES), person=rng.choice(PEOPLE), goods=rng.choice(GOODS),
        department=rng.choice(DEPARTMENTS),
    )  # fmt: skip


def _paragraphs(rng: random.Random) -> str:
    heading = f"<h2>About {rng.choice(DEPARTMENTS).lower()}</h2>"
    emphasis = f"<b>{rng.choice(PEOPLE)}</b> writes: "
    return f"{heading}\n<p>{emphasis}{' '.join(_sentence(rng) for _ in range(rng.randint(2, 3)))}</p>"


def _list(rng: random.Random) -> str:
    kind = rng.choice(("ul", "ol"))
    items = "".join(f"<li>{name}</li>" for name in rng.sample(GOODS, rng.randint(3, 5)))
    return f"<h2>{rng.choice(('In stock', 'Wanted', 'New this week'))}</h2>\n<{kind}>{items}</{kind}>"


def _table(rng: random.Random) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{rng.choice(CITIES)}</td><td>{rng.randint(1, 99)}</td></tr>"
        for name in rng.sample(PEOPLE, rng.randint(2, 5))
    )
    return f"<table><tr><th>Name</th><th>City</th><th>{rng.choice(('Orders', 'Age', 'Room'))}</th></tr>{rows}</table>"


def _form(rng: random.Random) -> str:
    options = "".join(f"<option>{city}</option>" for city in rng.sample(CITIES, 3))
    return (
        f'<form><div class="row"><label>Name</label><input value="{rng.choice(PEOPLE)}"></div>'
        f'<div class="row"><label>City</label><select>{options}</select></div>'
        f'<div class="row"><input type="checkbox"{rng.choice((" checked", ""))}> <label>Send me news</label></div>'
        f"<button>{rng.choice(('Send', 'Save', 'Sign up'))}</button></form>"
    )


def _cards(rng: random.Random) -> str:
    return "\n".join(f'<div class="card"><h3>{name}</h3><p>{_sentence(rng)}</p></div>' for name in rng.sample(GOODS, 2))


def _buttons(rng: random.Random) -> str:
    names = rng.sample(("Buy", "Cancel", "Compare", "Details", "Next", "Print", "Share"), rng.randint(2, 4))
    return f"<p>{' '.join(f'<button>{name}</button>' for name in names)}</p>"
