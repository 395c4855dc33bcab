"""The scenarios of the table, in its order."""

from __future__ import annotations

import signal

from .checks import Check, Counted, Exited, LogSays, NoneLost, NoneRefused, NothingLeft, Recovered, SameTexts
from .events import (
    ClientsCome,
    ClientsLeave,
    Expect,
    FillDisk,
    Join,
    KillAgain,
    Leave,
    Network,
    ReplaceAll,
    ResetConnections,
    Signal,
    SlowDown,
    SpoilData,
    TellToGo,
    Wait,
    WaitUntilWhole,
)
from .load import Load
from .proxy import Toxic
from .scenario import LOAD, USUAL, Scenario
from .world import Setup

TERM, STOP, CONTINUE = signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT
ADDRESSES = Setup(place="addresses")
PROXIES = Setup(place="proxies")
JOINING = Setup(options=("--allow-join", "--join-address", "127.0.0.1:0"))
STAYS = (*USUAL, NoneRefused())  # while it recovers it takes requests


def stays(seconds: float) -> tuple[Check, ...]:
    """The checks of `STAYS`, where it may take so many seconds to recover."""
    return NoneLost(), SameTexts(), Recovered(seconds), NothingLeft(), NoneRefused()


LONG = Load(words=200, tokens=64)

ATTENTION = (
    Scenario("nothing fails", "nothing", checks=STAYS),
    Scenario(
        "worker killed",
        "SIGKILL at one of two attention workers",
        (Signal("attention worker"),),
        checks=(*STAYS, Counted("lost_holders", 1, 1)),
    ),
    Scenario(
        "all workers killed",
        "SIGKILL at both attention workers at once",
        (Signal("attention worker", which=(0, 1)),),
        checks=(*USUAL, Counted("lost_holders", 2, 2)),
    ),
    Scenario(
        "only worker killed", "SIGKILL at the only attention worker", (Signal("attention worker"),), Setup(workers=1)
    ),
    Scenario(
        "worker frozen",
        "SIGSTOP at one of two attention workers, SIGCONT 15 s later",
        (Signal("attention worker", STOP), Wait(15), Signal("attention worker", CONTINUE)),
        ADDRESSES,
        checks=(*STAYS, Counted("lost_holders", 1, 1)),
    ),
    Scenario(
        "worker slow",
        "one of two attention workers runs a tenth of the time, for 10 s",
        (SlowDown("attention worker", share=0.1, seconds=10),),
        ADDRESSES,
        checks=STAYS,
    ),
    Scenario(
        "worker flaps",
        "SIGKILL at the same attention worker three times, each once it is used again; then it is held back for 30 s",
        (KillAgain("attention worker", 3),),
        checks=(*stays(120), LogSays("was lost too often")),
    ),
    Scenario(
        "worker told to go",
        "SIGTERM at one of two attention workers, and a new one at its address",
        (TellToGo("attention worker"),),
        checks=STAYS,
    ),
    Scenario(
        "rolling replacement",
        "SIGTERM at each attention worker in turn, followed by a new one at its address",
        (ReplaceAll(),),
        ADDRESSES,
        checks=STAYS,
    ),
)
REDUNDANCY = tuple(
    Scenario(name, failure, (Signal("attention worker", which=which),), setup, STAYS, LONG)
    for name, failure, which, setup in (
        ("long prompts", "SIGKILL at one of three attention workers, without redundancy", (0,), Setup(workers=3)),
        ("replica", "the same with a replica", (0,), Setup(workers=3, options=("--redundancy", "replica"))),
        ("parity", "the same with parity", (0,), Setup(workers=3, options=("--redundancy", "parity"))),
        (
            "replica(2)",
            "SIGKILL at two of three attention workers at once, with two replicas",
            (0, 1),
            Setup(workers=3, options=("--redundancy", "replica(2)")),
        ),
    )
)
NETWORK = (
    Scenario(
        "network cut",
        "the network to one of two attention workers takes everything and gives nothing, for 15 s",
        (Network(Toxic(black_hole=True), 15),),
        PROXIES,
        checks=STAYS,
    ),
    Scenario(
        "connections reset",
        "each connection to one of two attention workers is reset",
        (ResetConnections(),),
        PROXIES,
        checks=STAYS,
    ),
    Scenario(
        "network late",
        "each chunk from and to one of two attention workers is 5 ms late, for 10 s",
        (Network(Toxic(delay=0.005), 10),),
        PROXIES,
        checks=STAYS,
    ),
    Scenario(
        "bits flip",
        "one in a hundred chunks from and to one of two attention workers has a flipped bit: it is quarantined",
        (SpoilData(Toxic(flip=0.01), "is quarantined"), Expect(1)),
        Setup(place="proxies", tls=True, options=("--data-channel", "tcp")),
        checks=stays(120),  # between the two times it may be held back for losses of other kinds
    ),
)
MEMBERSHIP = (
    Scenario(
        "rolling upgrade",
        "attention workers of the previous version; SIGTERM at each in turn, followed by one of this version",
        (ReplaceAll(),),
        Setup(place="addresses", previous=True),
        checks=STAYS,
    ),
    Scenario(
        "load rises and falls",
        "22 clients more until three attention workers are there; they go, and two workers are let go",
        (ClientsCome(22, workers=3),),
        Setup(workers=1, options=("--autoscale", "1:3"), kv_memory="64MiB"),
        checks=stays(300),
        load=Load(clients=2, words=80, tokens=80),  # a fifth of a worker's KV memory: one has ample room for them
    ),
    Scenario("machine joins", "`lamina join` at another machine", (Join(),), JOINING, checks=STAYS),
    Scenario(
        "machine leaves",
        "a machine joins, serves for 5 s, and leaves at Ctrl-C",
        (Join(), WaitUntilWhole(), Wait(5), Leave()),
        JOINING,
        checks=STAYS,
    ),
)
SERVER = (
    Scenario("engine killed", "SIGKILL at the engine's process", (Signal("engine"),)),
    Scenario(
        "engine and worker killed",
        "SIGKILL at the engine's process and one of two attention workers",
        (Signal("engine"), Signal("attention worker")),
    ),
    Scenario(
        "model worker killed",
        "SIGKILL at the second of two tensor ranks",
        (Signal("model worker"),),
        Setup(workers=1, options=("--model-workers", "2")),
        checks=STAYS,
    ),
    Scenario(
        "HTTP process killed",
        "SIGKILL at the HTTP process; its connections break",
        (Signal("HTTP process"),),
        checks=(NoneLost(most=LOAD.clients), SameTexts(), Recovered(), NothingLeft()),
    ),
    Scenario(
        "disk full",
        "the engine's files cannot grow; 3 s later SIGKILL at the engine's process",
        (FillDisk("engine"), Wait(3), Signal("engine")),
        checks=(*USUAL, LogSays("journal")),
    ),
    Scenario("clients leave", "half of the clients close their connections", (ClientsLeave(2),), checks=STAYS),
    Scenario(
        "server told to end",
        "SIGTERM at `lamina serve`",
        (Signal("server", TERM), Wait(1)),
        checks=(NoneLost(), SameTexts(), Exited(0)),
        ends=True,
    ),
)
SCENARIOS = (*ATTENTION, *REDUNDANCY, *NETWORK, *MEMBERSHIP, *SERVER)
