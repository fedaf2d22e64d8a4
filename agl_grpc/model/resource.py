"""What agents work with: model endpoints, prompts, and types of the user's own."""

from __future__ import annotations

import dataclasses
import logging
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from agl_grpc.model.rollout import AttemptedRollout
from agl_grpc.model.times import from_timestamp, to_timestamp
from agl_grpc.model.value import from_key_values, to_key_values
from agl_grpc.v1 import resources_pb2

log = logging.getLogger(__name__)

ENGINES = ("f-string", "jinja", "poml")


@dataclass(slots=True, kw_only=True)
class Resource:
    """Anything that is published by name for agents; for a type of your own see `register_resource`."""

    resource_type: ClassVar[str] = "resource"


@dataclass(slots=True, kw_only=True)
class LLM(Resource):
    """A model endpoint used directly.

    ``endpoint`` is the base URL (``http://host:port/v1``), ``sampling_parameters`` are by their API names.
    """

    resource_type: ClassVar[str] = "llm"

    endpoint: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    sampling_parameters: dict[str, Any] = field(default_factory=dict)

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """The URL to give to an OpenAI client; a plain endpoint is the same for every attempt."""
        return self.endpoint


@dataclass(slots=True, kw_only=True)
class ProxyLLM(LLM):
    """A model endpoint behind the interceptor: the URL given to an agent names its rollout and attempt."""

    resource_type: ClassVar[str] = "proxy_llm"

    def get_base_url(self, rollout_id: str | None = None, attempt_id: str | None = None) -> str:
        """The URL for one attempt, ``…/rollout/{rollout}/attempt/{attempt}`` with ``/v1`` kept at its end.

        Without ids the endpoint as it is; with only one of them `ValueError`.
        """
        if rollout_id is None and attempt_id is None:
            return self.endpoint
        if rollout_id is None or attempt_id is None:
            raise ValueError("get_base_url needs both rollout_id and attempt_id, or neither")
        base = self.endpoint.removesuffix("/")
        versioned = base.endswith("/v1")
        base = base.removesuffix("/v1")
        return f"{base}/rollout/{rollout_id}/attempt/{attempt_id}" + ("/v1" if versioned else "")

    def with_attempted_rollout(self, rollout: AttemptedRollout) -> LLM:
        """A plain `LLM` for one attempt; without a key of its own it carries the attempt's credential."""
        return LLM(
            endpoint=self.get_base_url(rollout.rollout_id, rollout.attempt.attempt_id),
            model=self.model,
            api_key=self.api_key or rollout.attempt_credential or None,
            sampling_parameters=dict(self.sampling_parameters),
        )


@dataclass(slots=True, kw_only=True)
class PromptTemplate(Resource):
    """A text with places to fill in. ``engine`` is ``f-string`` (default), ``jinja`` or ``poml``."""

    resource_type: ClassVar[str] = "prompt_template"

    template: str
    engine: str = "f-string"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} is unknown; allowed: {', '.join(ENGINES)}")

    def format(self, **values: Any) -> str:
        """Fill the places in.

        Raises `KeyError` for a place without a value in an f-string template, and `RuntimeError` when the
        package that an engine needs (``jinja2``, ``poml``) is not installed.
        """
        if self.engine == "jinja":
            return _format_jinja(self.template, values)
        if self.engine == "poml":
            return _format_poml(self.template, values)
        missing = [name for name in _places(self.template) if name not in values]
        if missing:
            raise KeyError(f"the template has places without a value: {', '.join(missing)}")
        return self.template.format(**values)


def _places(template: str) -> list[str]:
    names = (name for _, name, _, _ in string.Formatter().parse(template) if name)
    return sorted({name.split(".")[0].split("[")[0] for name in names})


def _format_jinja(template: str, values: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise RuntimeError("jinja templates need the package jinja2: pip install jinja2") from None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(template).render(values)


def _format_poml(template: str, values: Mapping[str, Any]) -> str:
    try:
        import poml
    except ImportError:
        raise RuntimeError("poml templates need the package poml: pip install poml") from None
    messages = poml.poml(template, context=dict(values))
    return "\n".join(str(message["content"]) for message in messages)


_CustomType = TypeVar("_CustomType", bound=type[Resource])
_REGISTRY: dict[str, type[Resource]] = {}


def register_resource(resource_type: _CustomType) -> _CustomType:
    """Make a dataclass that extends `Resource` publishable under its ``resource_type``.

    Its fields must be values that `AnyValue` can hold. Raises `ValueError` when the name is taken.
    """
    name = resource_type.resource_type
    if not dataclasses.is_dataclass(resource_type):
        raise TypeError(f"{resource_type.__name__} must be a dataclass")
    if (
        name in {"resource", "llm", "proxy_llm", "prompt_template"}
        or _REGISTRY.get(name, resource_type) is not resource_type
    ):
        raise ValueError(
            f"the resource type {name!r} is taken; give {resource_type.__name__} another resource_type"
        )
    _REGISTRY[name] = resource_type
    return resource_type


@dataclass(slots=True, kw_only=True)
class UnknownResource(Resource):
    """A resource whose type is not registered in this process, or whose fields do not fit its type."""

    type_name: str
    fields: dict[str, Any] = field(default_factory=dict)


NamedResources = dict[str, Resource]


def resource_to_proto(name: str, resource: Resource) -> resources_pb2.Resource:
    """Write one named resource."""
    match resource:
        case ProxyLLM():
            return resources_pb2.Resource(
                name=name, proxy_llm=resources_pb2.ProxyLLM(**_endpoint_fields(resource))
            )
        case LLM():
            return resources_pb2.Resource(name=name, llm=resources_pb2.LLM(**_endpoint_fields(resource)))
        case PromptTemplate():
            template = resources_pb2.PromptTemplate(template=resource.template, engine=resource.engine)
            return resources_pb2.Resource(name=name, prompt_template=template)
        case UnknownResource():
            return _custom(name, resource.type_name, resource.fields)
    kind = type(resource).resource_type
    if _REGISTRY.get(kind) is not type(resource):
        raise TypeError(
            f"resource {name!r} is a {type(resource).__name__}; register its type with register_resource"
        )
    return _custom(name, kind, {f.name: getattr(resource, f.name) for f in dataclasses.fields(resource)})


def resource_from_proto(message: resources_pb2.Resource) -> Resource:
    """Read one resource."""
    match message.WhichOneof("kind"):
        case "proxy_llm":
            return ProxyLLM(**_endpoint_values(message.proxy_llm))
        case "llm":
            return LLM(**_endpoint_values(message.llm))
        case "prompt_template":
            template = message.prompt_template
            fields = {"template": template.template, "engine": template.engine or "f-string"}
            return _made(PromptTemplate, "prompt_template", fields)
        case "custom":
            values = from_key_values(message.custom.fields)
            registered = _REGISTRY.get(message.custom.resource_type)
            if registered is None:
                return UnknownResource(type_name=message.custom.resource_type, fields=values)
            return _made(registered, message.custom.resource_type, values)
    return UnknownResource(type_name="")


def _made(kind: type[Resource], name: str, fields: dict[str, Any]) -> Resource:
    # Published by another version, or in another language: one such resource must not hide the others.
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        log.warning("a resource of type %s cannot be read: %s", name, error)
        return UnknownResource(type_name=name, fields=fields)


def _custom(name: str, kind: str, values: Mapping[str, Any]) -> resources_pb2.Resource:
    custom = resources_pb2.CustomResource(resource_type=kind, fields=to_key_values(values, name))
    return resources_pb2.Resource(name=name, custom=custom)


def _endpoint_fields(resource: LLM) -> dict[str, Any]:
    return {
        "endpoint": resource.endpoint,
        "model": resource.model,
        "api_key": resource.api_key or "",
        "sampling_parameters": to_key_values(resource.sampling_parameters, "sampling_parameters"),
    }


def _endpoint_values(message: resources_pb2.LLM | resources_pb2.ProxyLLM) -> dict[str, Any]:
    return {
        "endpoint": message.endpoint,
        "model": message.model,
        "api_key": message.api_key or None,
        "sampling_parameters": from_key_values(message.sampling_parameters),
    }


@dataclass(slots=True, kw_only=True)
class ResourcesUpdate:
    """A published version of a set of resources; it never changes. Times are seconds since the epoch."""

    resources_id: str
    version: int = 1
    resources: NamedResources = field(default_factory=dict)
    create_time: float = 0.0
    update_time: float = 0.0
    run_id: str = "default"

    @classmethod
    def from_proto(cls, message: resources_pb2.ResourceSet) -> Self:
        """Read the stored form."""
        return cls(
            resources_id=message.resources_id,
            version=message.version,
            resources={resource.name: resource_from_proto(resource) for resource in message.resources},
            create_time=from_timestamp(message.create_time),
            update_time=from_timestamp(message.update_time),
            run_id=message.run_id,
        )

    def to_proto(self) -> resources_pb2.ResourceSet:
        """Write the stored form."""
        return resources_pb2.ResourceSet(
            resources_id=self.resources_id,
            version=self.version,
            run_id=self.run_id,
            resources=resources_to_proto(self.resources),
            create_time=to_timestamp(self.create_time),
            update_time=to_timestamp(self.update_time),
        )


def resources_to_proto(resources: Mapping[str, Resource]) -> list[resources_pb2.Resource]:
    """Write named resources in their order."""
    return [resource_to_proto(name, resource) for name, resource in resources.items()]
