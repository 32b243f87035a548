"""Invented web pages: headings, lists, tables, forms, cards and buttons in several styles."""

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


def page_of(chance: random.Random) -> str:
    """A page of three to six parts, as HTML with its style."""
    accent, family, size = chance.choice(ACCENTS), chance.choice(FONTS), chance.choice((14, 15, 16))
    style = (
        f"body{{font:{size}px/1.5 {family};margin:24px;color:#222}} h1,h2{{color:{accent}}} a{{color:{accent}}} "
        f"table{{border-collapse:collapse}} td,th{{border:1px solid #bbb;padding:4px 10px;text-align:left}} "
        f"button{{background:{accent};color:#fff;border:0;border-radius:4px;padding:6px 14px;font:inherit}} "
        f".card{{border:1px solid #ccc;border-radius:6px;padding:8px 14px;margin:10px 0}} input,select{{font:inherit}} "
        f"nav a{{margin-right:16px}} label{{margin-right:8px}} .row{{margin:8px 0}}"
    )
    parts = chance.sample((_paragraphs, _list, _table, _form, _cards, _buttons), chance.randint(3, 5))
    body = "\n".join(part(chance) for part in (_header, *parts))
    return f"<!DOCTYPE html>\n<html><head><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"


def _header(chance: random.Random) -> str:
    links = "".join(f'<a href="#">{name}</a>' for name in chance.sample(("Home", *DEPARTMENTS), chance.randint(3, 5)))
    return f"<nav>{links}</nav>\n<h1>{chance.choice(GOODS)} in {chance.choice(CITIES)}</h1>"


def _sentence(chance: random.Random) -> str:
    return chance.choice(SENTENCES).format(
        city=chance.choice(CITIES), person=chance.choice(PEOPLE), goods=chance.choice(GOODS),
        department=chance.choice(DEPARTMENTS),
    )  # fmt: skip


def _paragraphs(chance: random.Random) -> str:
    heading = f"<h2>About {chance.choice(DEPARTMENTS).lower()}</h2>"
    emphasis = f"<b>{chance.choice(PEOPLE)}</b> writes: "
    return f"{heading}\n<p>{emphasis}{' '.join(_sentence(chance) for _ in range(chance.randint(2, 3)))}</p>"


def _list(chance: random.Random) -> str:
    kind = chance.choice(("ul", "ol"))
    items = "".join(f"<li>{name}</li>" for name in chance.sample(GOODS, chance.randint(3, 5)))
    return f"<h2>{chance.choice(('In stock', 'Wanted', 'New this week'))}</h2>\n<{kind}>{items}</{kind}>"


def _table(chance: random.Random) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{chance.choice(CITIES)}</td><td>{chance.randint(1, 99)}</td></tr>"
        for name in chance.sample(PEOPLE, chance.randint(2, 5))
    )
    return (
        f"<table><tr><th>Name</th><th>City</th><th>{chance.choice(('Orders', 'Age', 'Room'))}</th></tr>{rows}</table>"
    )


def _form(chance: random.Random) -> str:
    options = "".join(f"<option>{city}</option>" for city in chance.sample(CITIES, 3))
    return (
        f'<form><div class="row"><label>Name</label><input value="{chance.choice(PEOPLE)}"></div>'
        f'<div class="row"><label>City</label><select>{options}</select></div>'
        f'<div class="row"><input type="checkbox"{chance.choice((" checked", ""))}> <label>Send me news</label></div>'
        f"<button>{chance.choice(('Send', 'Save', 'Sign up'))}</button></form>"
    )


def _cards(chance: random.Random) -> str:
    return "\n".join(
        f'<div class="card"><h3>{name}</h3><p>{_sentence(chance)}</p></div>' for name in chance.sample(GOODS, 2)
    )


def _buttons(chance: random.Random) -> str:
    names = chance.sample(("Buy", "Cancel", "Compare", "Details", "Next", "Print", "Share"), chance.randint(2, 4))
    return f"<p>{' '.join(f'<button>{name}</button>' for name in names)}</p>"
