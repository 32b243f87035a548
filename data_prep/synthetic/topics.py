"""Topics of drawn charts and tables: names that go together, and the range of their invented values."""

import random
from collections.abc import Collection
from dataclasses import dataclass


def split_names(text: str) -> tuple[str, ...]:
    """Names of one word each from a text."""
    return tuple(text.split())


YEARS = tuple(str(year) for year in range(1998, 2026))
MONTHS = split_names("January February March April May June July August September October November December")
DAYS = split_names("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
COUNTRIES = split_names(
    "Argentina Australia Brazil Canada Chile Denmark Egypt Finland France Germany Ghana Greece India "
    "Indonesia Italy Japan Kenya Mexico Morocco Norway Peru Poland Portugal Spain Sweden Thailand Turkey "
    "Vietnam"
)
CITIES = split_names(
    "Accra Athens Bergen Boston Cairo Dublin Geneva Hanoi Helsinki Kyoto Lima Lisbon Madrid Milan Nairobi Oslo Porto "
    "Prague Quito Riga Seville Tallinn Vienna Warsaw Zagreb"
)
FRUIT = split_names("Apples Bananas Cherries Figs Grapes Lemons Mangoes Melons Oranges Peaches Pears Plums")
GOODS = split_names("Bags Belts Books Chairs Clocks Desks Gloves Hats Kettles Lamps Mugs Pens Shelves Shoes Tents Toys")
ANIMALS = split_names("Badger Beaver Deer Eagle Fox Hare Heron Lynx Otter Owl Rabbit Seal Stork Wolf")
SPORTS = split_names("Archery Boxing Chess Cycling Fencing Football Hockey Judo Rowing Rugby Sailing Skiing Tennis")
PEOPLE = split_names(
    "Adams Baker Chen Costa Diaz Evans Fischer Garcia Haddad Ivanov Jensen Kim Lopez Mensah Novak Okafor "
    "Park Quinn Rossi Silva Tanaka Umar Virtanen Weber Yilmaz Zhang"
)
DEPARTMENTS = ("Design", "Finance", "Legal", "Logistics", "Marketing", "Production", "Research", "Sales", "Support")
SOURCES = ("Biomass", "Coal", "Gas", "Hydro", "Nuclear", "Oil", "Solar", "Wind")


@dataclass(frozen=True)
class Topic:
    """What a chart or a table is about.

    Attributes:
        title: of the values; the series' name is appended where there is only one series.
        unit: of every value; may be empty.
        head: title of the column of names.
        names: categories, of which a sample is drawn.
        series: series of values that can be drawn for the same categories.
        low, high: range of the values.
        ordered: the names have an order, so a contiguous range of them is drawn.
    """

    title: str
    unit: str
    head: str
    names: tuple[str, ...]
    series: tuple[str, ...]
    low: float
    high: float
    ordered: bool = False


TOPICS = (
    Topic("Electricity generated", "TWh", "Source", SOURCES, YEARS, 5, 400),
    Topic("Share of electricity", "%", "Year", YEARS, SOURCES, 2, 60, ordered=True),
    Topic("Mean temperature", "°C", "Month", MONTHS, CITIES, -10, 35, ordered=True),
    Topic("Rainfall", "mm", "Month", MONTHS, CITIES, 0, 240, ordered=True),
    Topic("Visitors", "thousands", "City", CITIES, YEARS, 20, 900),
    Topic("Population", "millions", "Country", COUNTRIES, YEARS, 3, 210),
    Topic("Harvest", "tonnes", "Fruit", FRUIT, YEARS, 10, 900),
    Topic("Price per kilogram", "EUR", "Fruit", FRUIT, CITIES, 0.5, 9),
    Topic("Items sold", "", "Item", GOODS, QUARTERS, 40, 2500),
    Topic("Items returned", "", "Item", GOODS, MONTHS, 1, 90),
    Topic("Revenue", "million USD", "Quarter", QUARTERS, DEPARTMENTS, 2, 80, ordered=True),
    Topic("Staff", "", "Department", DEPARTMENTS, YEARS, 4, 260),
    Topic("Hours of training", "", "Department", DEPARTMENTS, QUARTERS, 10, 480),
    Topic("Animals counted", "", "Animal", ANIMALS, YEARS, 2, 320),
    Topic("Club members", "", "Sport", SPORTS, CITIES, 15, 640),
    Topic("Medals won", "", "Country", COUNTRIES, SPORTS, 1, 38),
    Topic("Passengers", "thousands", "Day", DAYS, CITIES, 12, 480, ordered=True),
    Topic("Calls answered", "", "Day", DAYS, PEOPLE, 8, 130, ordered=True),
    Topic("Exports", "billion EUR", "Country", COUNTRIES, YEARS, 6, 420),
    Topic("Books lent", "", "Month", MONTHS, CITIES, 150, 4200, ordered=True),
)


def sample_names(rng: random.Random, names: tuple[str, ...], count: int, ordered: bool) -> list[str]:
    """`count` of the names: a contiguous range where they are ordered, else any of them."""
    if not ordered:
        return rng.sample(names, count)
    start = rng.randrange(len(names) - count + 1)
    return list(names[start : start + count])


def markdown_table(rows: list[list[str]], numeric: Collection[int] = ()) -> str:
    """A Markdown table.

    Args:
        rows: the first is the head.
        numeric: indices of the columns of numbers, which are aligned to the right.
    """
    marks = ["---:" if column in numeric else "---" for column in range(len(rows[0]))]
    shown = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (shown[0], marks, *shown[1:]))
