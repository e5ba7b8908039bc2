# SPDX-License-Identifier: Apache-2.0
"""Makes one run of the simulator from a scenario."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fvdtest.sim import engine, scenario, verify

ROOT = Path(__file__).resolve().parents[4]


@cache
def native() -> SimpleNamespace:
    """The compiled parts, built if need be."""
    path = ROOT / "tests/native/build.py"
    spec = importlib.util.spec_from_file_location("native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: SimpleNamespace = module.load("sim_")
    return found


@cache
def stepped() -> SimpleNamespace:
    """The compiled parts, with which this process's engine takes its steps.

    Raises engine.BuildError where it is not the engine of engine.environment().
    """
    parts = native()
    engine.own_steps(parts.sim_setup.step_address())
    return parts


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did; failure is empty when the engine kept all promises."""

    scenario: str
    seed: int
    digest: int
    failure: str
    figures: dict[str, int]
    trace: list[tuple[int, ...]]


def run(s: scenario.Scenario, check_all: bool = False) -> Result:
    """Make the run. A deadlock or a broken invariant of the engine ends the process."""
    sim = stepped().sim_world
    config = s.config | {"verify_share": scenario.VERIFY_ALL} if check_all else s.config
    base = scenario.base_content(s)
    verifier = verify.Verifier(s.geometry.base_length)
    world: Any = sim.World(
        config, scenario.image_content(s),
        scenario.data_content(s) if s.geometry.data_file else None,
        *scenario.base_files(s, base), scenario.start_content(s, base), verifier,
    )  # fmt: skip
    failure = ""
    try:
        for session in s.sessions:
            world.no_faults()
            for fault in session.faults:
                world.fault(fault.disk, fault.op, fault.countdown, fault.error, fault.sticky,
                            fault.chance)  # fmt: skip
            if session.outage:
                world.outage(session.outage.reads, session.outage.ns, session.outage.patience_ns)
            world.session(session.requests, session.clones, session.end, session.actions)
    except sim.SimulationFailed as error:
        failure = str(error)
    finally:
        world.rest()
        verifier.close()
    return Result(
        s.name, s.seed, world.digest(), failure, world.figures(), world.trace() if failure else []
    )
