"""How MaMuJoCo takes a body apart: which agent moves which joints, and what it sees of them.

The graphs of joints, their neighbours and bodies are those of ``gymnasium_robotics.mamujoco_v1`` (Peng et al. 2021,
FACMAC; de Witt), its slips included, because what an agent sees is the task. Everything that an agent sees is an entry
of the *source*: the observation of the single-agent task (D,), which is the state, and behind it, for three tasks, a
few numbers that the state clips or leaves out (``Source``). So factorising is a gather.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlopt.config import hint
from rlopt.envs.arrays import Array
from rlopt.types import RloptError

Fields = Mapping[str, Array]


class Source(NamedTuple):
    """Where MuJoCo's numbers lie in the source, of a task with nq positions, nv velocities and so many bodies."""

    nq: int
    nv: int
    skipped: int
    """Leading positions that the observation leaves out."""
    sizes: Mapping[str, int]
    """Entries of the observation by MuJoCo's field (Gymnasium's ``observation_structure``)."""
    size: int
    """D of the observation."""
    extra: str = ""
    """What lies behind it: ``qvel`` (not clipped), ``qpos`` (those left out) or ``reach`` (the tip's height)."""

    def position(self, i: int) -> int:
        i %= self.nq
        return i - self.skipped if i >= self.skipped else self.size + i

    def velocity(self, i: int) -> int:
        i %= self.nv
        return self.size + i if self.extra == "qvel" else self.nq - self.skipped + i

    def of_body(self, field: str, body: int) -> list[int]:
        """Return the places of a field's row; observations leave out the world's."""
        width = 10 if field == "cinert" else 6
        first = self._first(field) + width * (body - 1)
        return list(range(first, first + width))

    def actuator(self, i: int) -> int:
        return self._first("qfrc_actuator") + i % self.nv - 6

    def _first(self, field: str) -> int:
        order = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
        before = sum(self.sizes.get(name, 0) for name in order[: order.index(field)])
        return self.nq - self.skipped + self.nv + before


def beside(extra: str, d: Fields) -> Array | None:
    """Return what lies behind the observation in the source, (…, k), None where nothing does."""
    if extra == "qvel":
        return d["qvel"]
    if extra == "qpos":
        return d["qpos"][..., :2]
    if extra == "reach":
        fingertip, target = 3, 4
        return d["xpos"][..., fingertip, 2:] - d["xpos"][..., target, 2:]
    return None


@dataclass(frozen=True, eq=False)
class Joint:
    """One joint of the graph; two of one name are two."""

    name: str
    """Joints at one distance are seen in the order of their names."""
    place: int
    """In positions and velocities; negative from the end."""
    control: int
    bodies: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A task's joints, and what agents see of them."""

    joints: tuple[Joint, ...]
    """In the order in which ``KxM`` deals them out."""
    edges: tuple[tuple[Joint, ...], ...]
    """Groups of joints that neighbour each other."""
    parts: Mapping[str, tuple[str, ...]]
    """Partitions with a name of their own: the joints of each agent."""
    common: Callable[[Source], list[int]]
    """What every agent sees of the root."""
    fields: tuple[str, ...] = ()
    """What an agent sees of its own joints beside position and velocity."""
    look: Callable[[Joint, str, Source], list[int]] | None = None
    """Where joints are seen in another way: the places of ``qpos``, ``qvel`` or a field of ``fields``."""


def _chain(names: str, place: int) -> tuple[Joint, ...]:
    return tuple(Joint(name, place + i, i) for i, name in enumerate(names.split()))


def _edges(joints: Sequence[Joint], groups: str) -> tuple[tuple[Joint, ...], ...]:
    found = {joint.name: joint for joint in joints}
    return tuple(tuple(found[name] for name in group.split("-")) for group in groups.split())


def _planar(s: Source) -> list[int]:
    return [s.position(1), s.position(2), s.velocity(0), s.velocity(1), s.velocity(2)]


def _free(s: Source) -> list[int]:
    return [s.position(i) for i in range(2, 7)] + [s.velocity(i) for i in range(6)]


def _half_cheetah() -> Graph:
    joints = _chain("bthigh bshin bfoot fthigh fshin ffoot", -6)
    return Graph(joints, _edges(joints, "bfoot-bshin bshin-bthigh bthigh-fthigh fthigh-fshin fshin-ffoot"), {}, _planar)


def _hopper() -> Graph:
    joints = _chain("thigh leg foot", -3)
    joints = tuple(Joint(f"{j.name}_joint", j.place, j.control) for j in joints)
    return Graph(joints, _edges(joints, "foot_joint-leg_joint leg_joint-thigh_joint"), {}, _planar)


def _walker2d() -> Graph:
    names = "thigh_joint leg_joint foot_joint thigh_left_joint leg_left_joint foot_left_joint"
    thigh, leg, foot, left_thigh, left_leg, left_foot = joints = _chain(names, -6)
    groups = (
        "foot_joint-leg_joint leg_joint-thigh_joint foot_left_joint-leg_left_joint leg_left_joint-thigh_left_joint "
        "thigh_joint-thigh_left_joint"
    )
    return Graph((foot, leg, thigh, left_foot, left_leg, left_thigh), _edges(joints, groups), {}, _planar)


def _ant() -> Graph:
    torso, joints = 1, list[Joint]()
    for leg in range(4):  # hip 4 and ankle 4 are the first actuators
        first, place, control = 2 + 3 * leg, -8 + 2 * leg, (2 + 2 * leg) % 8
        joints += [
            Joint(f"hip{leg + 1}", place, control, (torso, first)),
            Joint(f"ankle{leg + 1}", place + 1, control + 1, (first, first + 1, first + 2)),
        ]
    edges = _edges(joints, "ankle4-hip4 ankle1-hip1 ankle2-hip2 ankle3-hip3 hip4-hip1-hip2-hip3")
    diagonal = ("hip1 ankle1 hip4 ankle4", "hip2 ankle2 hip3 ankle3")
    return Graph(tuple(joints), edges, {"2x4d": diagonal}, _free, ("cfrc_ext",))


_HUMANOID = {
    "abdomen_y": (1, 2, 3), "abdomen_z": (1, 2, 3), "abdomen_x": (3, 4, 7), "right_hip_x": (4, 5),
    "right_hip_z": (4, 5), "right_hip_y": (4, 5), "right_knee": (5, 6), "left_hip_x": (7, 8), "left_hip_z": (7, 8),
    "left_hip_y": (7, 8), "left_knee": (8, 9), "right_shoulder1": (1, 10, 11), "right_shoulder2": (1, 10, 11),
    "right_elbow": (11,), "left_shoulder1": (1, 12, 13), "left_shoulder2": (1, 12, 13), "left_elbow": (13,),
}  # fmt: skip
"""The bodies of each joint, in the order of the actuators."""


def _humanoid() -> Graph:
    joints = tuple(Joint(name, i - 17, i, bodies) for i, (name, bodies) in enumerate(_HUMANOID.items()))
    waist, hips = "abdomen_x-abdomen_y-abdomen_z", "{0}_hip_x-{0}_hip_y-{0}_hip_z"
    groups = [waist]
    for side in ("right", "left"):
        shoulders, hip = f"{side}_shoulder1-{side}_shoulder2", hips.format(side)
        groups += [
            hip,
            f"{side}_elbow-{shoulders}",
            f"{side}_knee-{hip}",
            f"{shoulders}-{waist}",
            f"{waist}-{hip}",
        ]
    upper = (
        "abdomen_x abdomen_y abdomen_z right_shoulder1 right_shoulder2 right_elbow left_shoulder1 left_shoulder2 "
        "left_elbow"
    )
    lower = "right_hip_x right_hip_y right_hip_z right_knee left_hip_x left_hip_y left_hip_z left_knee"
    fields = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    return Graph(joints, _edges(joints, " ".join(groups)), {"9_8": (upper, lower)}, _free, fields)


def _reacher() -> Graph:
    joints = _chain("joint0 joint1", -4)

    def look(joint: Joint, category: str, s: Source) -> list[int]:
        if category == "qpos":  # sine and cosine; the observation begins with both cosines
            return [2 + joint.control, joint.control]
        if category == "qvel":
            return [6 + joint.control]
        return [8, 9, s.size] if joint.name == "joint1" else []

    return Graph(joints, (joints,), {}, lambda s: [4, 5], ("to_tip",), look)


def _pusher() -> Graph:
    lift, arm, wrist = "r_wrist_roll_joint", "r_upper_arm_roll_joint", "r_wrist_roll_joint"
    names = ("r_wrist_roll_joint", lift, arm, "r_elbow_flex_joint", "r_forearm_roll_joint", "r_wrist_flex_joint", wrist)
    joints = tuple(Joint(name, i, i) for i, name in enumerate(names))
    places = list(range(14, 23))  # of the tip, the object and the goal
    look = lambda joint, category, s: [joint.place + (7 if category == "qvel" else 0)]  # noqa: E731
    edges = tuple(itertools.pairwise(joints))
    return Graph(joints, edges, {"3p": ("0 1 2", "3", "4 5 6")}, lambda s: places, (), look)


def _swimmer() -> Graph:
    joints = _chain("rot2 rot3", -2)

    def look(joint: Joint, category: str, s: Source) -> list[int]:
        if category == "qpos":
            return [s.position(joint.place)]
        return [s.velocity(joint.control), s.velocity(joint.control + 3)]

    return Graph(joints, (joints,), {}, lambda s: [s.position(2), s.velocity(2)], (), look)


def _segmented_swimmer(segments: int) -> Graph:
    joints = _chain(" ".join(f"rot{i}" for i in range(segments)), -segments)
    return Graph(joints, tuple(itertools.pairwise(joints)), {}, lambda s: [])


def _segmented_ant(segments: int) -> Graph:
    joints, edges, before = list[Joint](), list[tuple[Joint, ...]](), tuple[Joint, ...]()
    for k in range(segments):
        # The reference counts the segments' places backwards, and beyond the last but one from the root's first.
        place, bodies, control = -4 + 4 * (segments - 1 - k), [7 * k + i for i in range(1, 8)], 4 * k
        torso, front, aux1, ankle1, back, aux2, ankle2 = bodies
        own = (
            Joint(f"hip1_{k}", place, control + 2, (torso, front)),
            Joint(f"ankle1_{k}", place + 1, control + 3, (front, aux1, ankle1)),
            Joint(f"hip2_{k}", place + 2, control, (torso, back)),
            Joint(f"ankle2_{k}", place + 3, control + 1, (back, aux2, ankle2)),
        )
        hip1, ankle_1, hip2, ankle_2 = own
        edges += [(ankle_1, hip1), (ankle_2, hip2), (hip1, hip2)]
        if before:
            edges += [(*before, hip1, hip2)]
        # It joins a segment to copies of the hips before it: these see nothing of the segments behind them.
        before = tuple(Joint(j.name, j.place, j.control, j.bodies) for j in (hip1, hip2))
        joints += own
    return Graph(tuple(joints), tuple(edges), {}, _free, ("cfrc_ext",))


_GRAPHS: dict[str, Callable[[], Graph]] = {
    "Ant": _ant,
    "HalfCheetah": _half_cheetah,
    "Hopper": _hopper,
    "Humanoid": _humanoid,
    "HumanoidStandup": _humanoid,
    "Pusher": _pusher,
    "Reacher": _reacher,
    "Swimmer": _swimmer,
    "Walker2d": _walker2d,
}
SEGMENTED = {"ManySegmentAnt": _segmented_ant, "ManySegmentSwimmer": _segmented_swimmer}
"""Tasks whose body is made to measure: ``KxM`` has K times M segments."""
SCENARIOS = (*_GRAPHS, *SEGMENTED)
EXTRA = {"Walker2d": "qvel", "Reacher": "reach", "ManySegmentAnt": "qpos"}
"""Tasks of which agents see what the state clips or leaves out (see ``Source``)."""


def segments(partition: str) -> int:
    """Return K times M of ``KxM``; 0 where it is none."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", partition)
    return int(match[1]) * int(match[2]) if match else 0


def partitions(scenario: str) -> list[str]:
    """Return the partitions of a task with a body of fixed size."""
    graph = _GRAPHS[scenario]()
    count = len(graph.joints)
    even = [f"{k}x{count // k}" for k in range(2, count + 1) if count % k == 0]
    return [*even, *graph.parts]


def divide(scenario: str, partition: str) -> tuple[Graph, list[tuple[Joint, ...]]]:
    """Return the graph of a task and the joints of each agent, in the order of their actions.

    ``KxM`` deals out M joints to each of K agents, one after the other; some tasks have partitions with other names.

    Raises:
        RloptError: there is no such task or partition.
    """
    if scenario in SEGMENTED:
        if not segments(partition):
            raise RloptError(f"{scenario}-{partition}: write KxM, for K agents of M segments each, as {scenario}-2x3")
        graph = SEGMENTED[scenario](segments(partition))
    elif scenario in _GRAPHS:
        graph = _GRAPHS[scenario]()
        if partition not in partitions(scenario):
            raise RloptError(f"{scenario} has no partition {partition!r}; {hint(partition, partitions(scenario))}")
    else:
        raise RloptError(f"MaMuJoCo has no task {scenario!r}; {hint(scenario, SCENARIOS)}")
    joints = graph.joints
    if partition in graph.parts:
        by_name = {joint.name: joint for joint in joints} | {str(i): joint for i, joint in enumerate(joints)}
        return graph, [tuple(by_name[name] for name in part.split()) for part in graph.parts[partition]]
    agents = int(partition.partition("x")[0])
    each = len(joints) // agents
    return graph, [joints[i * each : (i + 1) * each] for i in range(agents)]


def seen(graph: Graph, part: Sequence[Joint], source: Source, depth: int) -> list[int]:
    """Return the places in the source that the agent of ``part`` sees: of its own joints all, of those at a distance of
    1 … ``depth`` the positions, of the root what all see."""
    reached, ring = set(part), set(part)
    found, bodies = list[int](), set[tuple[str, int]]()
    for k in range(depth + 1):
        if k:
            ring = {near for joint in ring for edge in graph.edges if joint in edge for near in edge} - reached
            reached |= ring
        # Equal names keep the order of the actuators; the reference leaves it to chance.
        for joint in sorted(ring, key=lambda j: (j.name, j.control)):
            for category in ("qpos",) if k else ("qpos", "qvel", *graph.fields):
                if graph.look is not None:
                    found += graph.look(joint, category, source)
                elif category == "qpos":
                    found.append(source.position(joint.place))
                elif category == "qvel":
                    found.append(source.velocity(joint.place))
                elif category == "qfrc_actuator":
                    found.append(source.actuator(joint.place))
                else:
                    for body in joint.bodies:
                        if (category, body) not in bodies:
                            bodies.add((category, body))
                            found += source.of_body(category, body)
    return found + graph.common(source)


def source_of(scenario: str, env: Any) -> Source:
    """Return the source of an unwrapped environment of Gymnasium.

    Raises:
        RloptError: its observation lacks what the agents see.
    """
    structure: Mapping[str, int] = getattr(env, "observation_structure", {})
    names = _humanoid().fields if scenario.startswith("Humanoid") else _ant().fields if "Ant" in scenario else ()
    if missing := [name for name in names if not structure.get(name)]:
        raise RloptError(f"the agents of {scenario} see {missing[0]}; leave env.kwargs that take it away")
    return Source(
        nq=env.model.nq,
        nv=env.model.nv,
        skipped=structure.get("skipped_qpos", 0),
        sizes={name: structure.get(name, 0) for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")},
        size=env.observation_space.shape[0],
        extra=EXTRA.get(scenario, ""),
    )
