"""Household problems for the engine of ALFWorld (Shridhar et al. 2021, arXiv 2010.03768), made here because its own
game files are a download: a room of receptacles, objects in them, and one of the six kinds of task."""

from __future__ import annotations

from typing import NamedTuple

from numpy.random import Generator

from rlopt.random import numpy_generator

KINDS = (
    "pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place",
)  # fmt: skip
OPENABLE = ("Fridge", "Microwave", "Cabinet", "Drawer", "Safe")
KITCHEN = {
    "Fridge": 1, "Microwave": 1, "SinkBasin": 1, "GarbageCan": 1, "CounterTop": 2, "DiningTable": 1, "Cabinet": 4,
    "Drawer": 2, "Shelf": 2,
}  # fmt: skip
BEDROOM = {
    "Desk": 2,
    "Dresser": 1,
    "Bed": 1,
    "SideTable": 2,
    "Sofa": 1,
    "Safe": 1,
    "Drawer": 4,
    "Shelf": 2,
    "GarbageCan": 1,
}
FOOD = ("Apple", "Egg", "Potato", "Tomato", "Bread")
DISHES = ("Mug", "Cup", "Plate", "Bowl", "Pan", "Fork", "Spoon")
THINGS = ("Book", "Pen", "Pencil", "CD", "Watch", "Vase", "CreditCard", "CellPhone", "KeyChain", "Pillow")
DOES = {"clean": "isClean", "heat": "isHot", "cool": "isCool"}
RECEPTACLE_TYPES = sorted({*KITCHEN, *BEDROOM})
OBJECT_TYPES = sorted({*FOOD, *DISHES, *THINGS, "DeskLamp", "Knife", "ButterKnife"})


class Problem(NamedTuple):
    """One task."""

    kind: str
    words: str
    """What is asked for."""
    pddl: str


def pairs(kind: str, unseen: bool) -> list[tuple[str, str]]:
    """Return the pairs (what is asked for, where it belongs) of a kind: every fourth is kept for ``unseen`` tasks."""
    if kind == "look_at_obj_in_light":
        every = [(thing, "DeskLamp") for thing in THINGS[:8]]
    elif kind in ("pick_and_place_simple", "pick_two_obj_and_place"):
        every = [(thing, place) for thing in THINGS for place in ("Desk", "Dresser", "Sofa", "Safe", "Drawer", "Shelf")]
    else:
        what = {"clean": (*DISHES, *FOOD[:4]), "heat": (*FOOD, "Mug", "Cup", "Plate"), "cool": (*FOOD, *DISHES[:5])}
        every = [
            (x, y) for x in what[kind.split("_")[1]] for y in ("CounterTop", "DiningTable", "Cabinet", "GarbageCan")
        ]
    return [pair for i, pair in enumerate(every) if (i % 4 == 3) == unseen]


def problem(number: int, unseen: bool = False) -> Problem:
    """Return problem ``number``, the same everywhere; its kind is ``number`` modulo six."""
    kind = KINDS[number % len(KINDS)]
    draw = numpy_generator(0, "household", "unseen" if unseen else "seen", number)
    what, where = (found := pairs(kind, unseen))[int(draw.integers(len(found)))]
    kitchen = kind.split("_")[1] in DOES
    room = [(t, i) for t, n in (KITCHEN if kitchen else BEDROOM).items() for i in range(1, n + 1)]
    wanted = 2 if kind == "pick_two_obj_and_place" else 1
    spread = [t for t in ((*FOOD, *DISHES) if kitchen else THINGS) if t != what]
    objects = [what] * (wanted + int(draw.integers(2))) + [str(x) for x in draw.choice(spread, 6)]
    # Nothing begins where it belongs, nor in a machine, where it would be warm or cold to begin with.
    free = [k for k, (t, _) in enumerate(room) if t not in (where, "Fridge", "Microwave", "SinkBasin")]
    places = [int(x) for x in draw.choice(free, len(objects))]
    if kind == "look_at_obj_in_light":
        desks = [k for k, (t, _) in enumerate(room) if t in ("Desk", "SideTable")]
        objects, places = [*objects, "DeskLamp"], [*places, int(draw.choice(desks))]
    words, goal = _asked(kind, what, where)
    return Problem(kind, words, _pddl(room, objects, places, goal, draw))


def _asked(kind: str, what: str, where: str) -> tuple[str, str]:
    thing, place = what.lower(), where.lower()
    there = f"(objectType ?o {what}Type) (receptacleType ?r {where}Type) (inReceptacle ?o ?r)"
    one = "(exists (?r - receptacle) (exists (?o - object) (and {})))"
    if kind == "look_at_obj_in_light":
        lit = "(toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) (inReceptacle ?ot ?r) (atLocation ?a ?l)"
        goal = (
            "(exists (?ot - object ?r - receptacle ?a - agent ?l - location) "
            f"(and (objectType ?ot {where}Type) {lit})) "
            f"(exists (?o - object ?a - agent) (and (objectType ?o {what}Type) (holds ?a ?o)))"
        )
        return f"look at {thing} under the {place}", goal
    if kind == "pick_two_obj_and_place":
        second = f"(objectType ?p {what}Type) (not (= ?o ?p)) (inReceptacle ?p ?r)"
        goal = f"(exists (?r - receptacle) (exists (?o - object) (and {there} (exists (?p - object) (and {second})))))"
        return f"put two {thing} in {place}", goal
    if kind == "pick_and_place_simple":
        return f"put a {thing} in {place}", one.format(there)
    verb = kind.split("_")[1]
    machine = {"clean": "cleanable", "heat": "heatable", "cool": "coolable"}[verb]
    goal = one.format(f"({machine} ?o) ({DOES[verb]} ?o) {there}")
    return f"{verb} some {thing} and put it in {place}", goal


def _pddl(room: list[tuple[str, int]], objects: list[str], places: list[int], goal: str, draw: Generator) -> str:
    """Return the problem in the planning language, in ALFWorld's names."""
    receptacles = [("Sink_bar_1_bar_SinkBasin" if t == "SinkBasin" else f"{t}_bar_{i}") for t, i in room]
    # Which apple is called apple 1 is no sign of where it lies.
    labels = [int(x) for x in draw.permutation(len(objects))]
    names = [f"{t}_bar_{label}" for t, label in zip(objects, labels, strict=True)]
    spots = [f"loc_bar_{k}" for k in range(len(room) + 1)]
    facts = [f"(atLocation agent1 {spots[-1]})", "(= (total-cost) 0)"]
    for name, (kind, _), spot in zip(receptacles, room, spots, strict=False):
        facts += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {spot})"]
        facts += [f"(openable {name})"] if kind in OPENABLE else []
    for name, kind, k in zip(names, objects, places, strict=True):
        facts += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {receptacles[k]})"]
        facts += [f"(objectAtLocation {name} {spots[k]})"]
        facts += [f"({'toggleable' if kind == 'DeskLamp' else 'pickupable'} {name})"]
        facts += [f"(cleanable {name})"] if kind in (*DISHES, *FOOD[:4]) else []
        facts += [f"(heatable {name})"] if kind in (*FOOD, "Mug", "Cup", "Plate") else []
        facts += [f"(coolable {name})"] if kind in (*FOOD, *DISHES[:5]) else []
    facts += [f"(canContain {r}Type {o}Type)" for r in sorted({t for t, _ in room}) for o in sorted(set(objects))]
    declared = [
        "agent1 - agent", *(f"{x} - location" for x in spots), *(f"{x} - receptacle" for x in receptacles),
        *(f"{x} - object" for x in names), *(f"{x}Type - rtype" for x in RECEPTACLE_TYPES),
        *(f"{x}Type - otype" for x in OBJECT_TYPES),
    ]  # fmt: skip
    return (
        "(define (problem household)\n(:domain alfred)\n(:objects\n{}\n)\n(:init\n{}\n)\n(:goal (and {}))\n"
        "(:metric minimize (total-cost))\n)\n"
    ).format("\n".join(declared), "\n".join(facts), goal)
