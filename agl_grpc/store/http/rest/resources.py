"""REST: resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.rpc import code_pb2

from agl_grpc.model.value import to_key_values
from agl_grpc.store import limits
from agl_grpc.store.door.methods import Methods
from agl_grpc.store.errors import StoreError
from agl_grpc.store.http.problems import malformed
from agl_grpc.store.http.request import Request
from agl_grpc.store.http.rest import show
from agl_grpc.store.http.rest.lists import envelope, list_fields, paging
from agl_grpc.store.http.rest.rollouts import notes_of
from agl_grpc.store.http.routing import Answer, Handler
from agl_grpc.store.http.shape import Fields
from agl_grpc.v1 import resources_pb2, store_service_pb2

SORTABLE = ("resources_id", "create_time", "update_time", "version")
"""Fields by which publications can be sorted."""

_ENGINES = ("f-string", "jinja", "poml")


class ResourceRoutes:
    """Serves the routes about resources."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Handlers by method and path below the API's prefix."""
        return {
            ("GET", "/resources"): self.search,
            ("POST", "/resources"): self.publish,
            ("GET", "/resources/latest"): self.latest,
            ("GET", "/resources/{resources_id}"): self.get,
            ("POST", "/resources/{resources_id}"): self.publish,
        }

    async def search(self, http: Request) -> Answer:
        """The newest version of each set."""
        fields = await list_fields(http)
        chosen = paging(fields, SORTABLE)
        request = store_service_pb2.ListResourcesRequest(
            resources_id=fields.text("resources_id") or "",
            resources_id_contains=fields.text("resources_id_contains") or "",
        )
        return await envelope(
            *(self._methods, http, request, chosen, limits.PAGE_SIZE),
            lambda page: page.resources,
            show.resources,
        )

    async def publish(self, http: Request) -> Answer:
        """A new set, or the next version of the one that the path names."""
        named = Fields(await http.json())
        resources_id = http.names.get("resources_id", "")
        request = store_service_pb2.PublishResourcesRequest(
            resources_id=resources_id,
            resources=[resource_of(name, named) for name in named.values],
            request_id=http.header(b"idempotency-key"),
        )
        response = await self._methods(request, http.metadata)
        return Answer(show.dump(show.resources(response.resources)), 200 if resources_id else 201)

    async def latest(self, http: Request) -> Answer:
        """The last publication; null before the first."""
        response = await self._methods(store_service_pb2.GetLatestResourcesRequest(), http.metadata)
        shown = show.resources(response.resources) if response.HasField("resources") else None
        return Answer(show.dump(shown))

    async def get(self, http: Request) -> Answer:
        """The newest version of a set; null when it is unknown."""
        request = store_service_pb2.GetResourcesRequest(resources_id=http.names["resources_id"])
        try:
            response = await self._methods(request, http.metadata)
        except StoreError as error:
            if error.code != code_pb2.NOT_FOUND:
                raise
            return Answer(b"null")
        return Answer(show.dump(show.resources(response.resources)))


def resource_of(name: str, named: Fields) -> resources_pb2.Resource:
    """One resource of a map of them; a type that the contract does not know is the user's own."""
    fields = named.fields(name)
    if fields is None:
        raise malformed(name, "must be a JSON object")
    kind = fields.required_text("resource_type")
    if kind == "prompt_template":
        engine = fields.choice("engine", _ENGINES, "f-string") or "f-string"
        template = resources_pb2.PromptTemplate(template=fields.required_text("template"), engine=engine)
        return resources_pb2.Resource(name=name, prompt_template=template)
    if kind not in ("llm", "proxy_llm"):
        return resources_pb2.Resource(name=name, custom=_custom(kind, fields))
    endpoint: dict[str, Any] = {
        "endpoint": fields.required_text("endpoint"),
        "model": fields.required_text("model"),
        "api_key": fields.text("api_key") or "",
        "sampling_parameters": notes_of(fields, "sampling_parameters"),
    }
    if kind == "llm":
        return resources_pb2.Resource(name=name, llm=resources_pb2.LLM(**endpoint))
    return resources_pb2.Resource(name=name, proxy_llm=resources_pb2.ProxyLLM(**endpoint))


def _custom(kind: str, fields: Fields) -> resources_pb2.CustomResource:
    values = {name: value for name, value in fields.values.items() if name != "resource_type"}
    try:
        return resources_pb2.CustomResource(resource_type=kind, fields=to_key_values(values, fields.path))
    except (ValueError, TypeError) as error:
        raise malformed(fields.path, f"cannot be kept: {error}") from error
