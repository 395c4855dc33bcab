"""A process of protocol version 7, as far as others can tell: `python version_seven.py MODULE ARGUMENTS`.

All that came with version 8 is taken out of the modules before they are used, and 7's checks of its peers are put back.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from lamina_protocols.channels import versions
from lamina_protocols.errors import ProtocolError
from lamina_protocols.frames import fields

LATER = {"Bound"}  # records of version 8
RELEASE = "0.1.0"


def become_seven() -> None:
    """To be called before anything else of Lamina is imported."""
    versions.PROTOCOL_VERSION, versions.FEATURES, versions.check_neighbours = 7, frozenset(), _same
    record_of, one_of, later = fields.Record.of, fields._one_of, set[str]()

    def known(noun: type) -> fields.Record:
        record = record_of(noun)
        later.update(name for name, _ in record.later)
        return record._replace(fields={name: it for name, it in record.fields.items() if name not in later}, later=())

    fields.Record.of = known  # type: ignore[method-assign]
    fields._one_of = lambda kinds: one_of([kind for kind in kinds if getattr(kind, "__name__", "") not in LATER])

    from lamina_protocols.channels import control
    from lamina_protocols.frames import codec

    layout_of = codec.Layout.of

    def layout(message: type) -> codec.Layout:
        made = layout_of(message)
        return made._replace(tensors=tuple(name for name in made.tensors if name not in later))

    codec.Layout.of = layout  # type: ignore[method-assign]
    codec._CODEC = codec.Codec(codec._MESSAGES)
    unpack = control.unpack

    def of_one_release(cls: type, data: bytes) -> Any:
        message = unpack(cls, data)
        if isinstance(message, control.Hello):
            control.check("lamina version", message.version, RELEASE)
        return message

    control.unpack = of_one_release  # type: ignore[assignment]
    control.package_version = lambda: RELEASE


def _same(engine: object, worker: object) -> None:
    if engine != worker:
        raise ProtocolError(f"protocol version: the engine has {engine}, this worker {worker}")


if __name__ == "__main__":
    become_seven()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
