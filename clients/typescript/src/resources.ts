// Published resources as agents use them.

import type { Lease } from "./gen/agl_grpc/v1/attempt_pb.js";
import type { ResourceSet } from "./gen/agl_grpc/v1/resources_pb.js";
import { fromKeyValues, type Value } from "./values.js";

/** A model endpoint: what an OpenAI client needs. */
export interface Model {
  readonly name: string;
  readonly baseUrl: string;
  readonly model: string;
  readonly apiKey: string;
  readonly samplingParameters: { readonly [key: string]: Value };
}

/**
 * The base URL of the interceptor for one attempt: `…/rollout/{rollout}/attempt/{attempt}`, with a
 * trailing `/v1` kept at its end.
 */
export function attemptUrl(endpoint: string, rolloutId: string, attemptId: string): string {
  const base = endpoint.replace(/\/$/, "");
  const versioned = base.endsWith("/v1");
  return `${base.replace(/\/v1$/, "")}/rollout/${rolloutId}/attempt/${attemptId}${versioned ? "/v1" : ""}`;
}

/**
 * The first model of a set, or the one of that name, for one attempt. Behind the interceptor the URL
 * names rollout and attempt, and without a key of its own it carries the attempt's credential.
 */
export function bindModel(resources: ResourceSet | undefined, lease: Lease, name?: string): Model | undefined {
  for (const resource of resources?.resources ?? []) {
    const { kind } = resource;
    if ((kind.case !== "llm" && kind.case !== "proxyLlm") || (name !== undefined && resource.name !== name)) continue;
    const proxied = kind.case === "proxyLlm";
    const { endpoint, model, apiKey, samplingParameters } = kind.value;
    return {
      name: resource.name,
      baseUrl: proxied ? attemptUrl(endpoint, lease.rolloutId, lease.attemptId) : endpoint,
      model,
      apiKey: apiKey || (proxied ? lease.attemptCredential : ""),
      samplingParameters: fromKeyValues(samplingParameters),
    };
  }
  return undefined;
}
