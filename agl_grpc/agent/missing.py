"""Resources that an agent needs and that are not there."""

from __future__ import annotations

from collections.abc import Mapping

from agl_grpc.model.resource import Resource


class ResourceMissing(ValueError, KeyError):
    """What an agent needs is not published; the attempt fails with the type ``RESOURCE_MISSING``."""

    def __init__(self, needed: str, published: Mapping[str, Resource]) -> None:
        names = ", ".join(f"{name} ({type(resource).__name__})" for name, resource in published.items())
        super().__init__(f"the agent needs {needed}, and none is published; published: {names or 'nothing'}")

    def __str__(self) -> str:  # KeyError would show its repr
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[ValueError], tuple[str]]:
        return ValueError, (str(self),)


class PublishedResources(dict[str, Resource]):
    """Resources by name, as an agent gets them; a name that is missing says what there is."""

    def __missing__(self, name: str) -> Resource:
        raise ResourceMissing(f"a resource named {name!r}", self)
