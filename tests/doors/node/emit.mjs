// Emits two spans with each stock exporter of OpenTelemetry for Node.js: gRPC, HTTP with protobuf, HTTP with JSON.
// Arguments: the gRPC address, the HTTP address, the rollout's id, the attempt's id.
import { SpanStatusCode } from "@opentelemetry/api";
import { OTLPTraceExporter as GrpcExporter } from "@opentelemetry/exporter-trace-otlp-grpc";
import { OTLPTraceExporter as JsonExporter } from "@opentelemetry/exporter-trace-otlp-http";
import { OTLPTraceExporter as ProtoExporter } from "@opentelemetry/exporter-trace-otlp-proto";
import { resourceFromAttributes } from "@opentelemetry/resources";
import { BatchSpanProcessor, NodeTracerProvider } from "@opentelemetry/sdk-trace-node";

const [grpc, http, rolloutId, attemptId] = process.argv.slice(2);
const resource = resourceFromAttributes({
  "service.name": "node",
  "agentlightning.rollout_id": rolloutId,
  "agentlightning.attempt_id": attemptId,
});
const exporters = {
  grpc: new GrpcExporter({ url: `http://${grpc}` }),
  proto: new ProtoExporter({ url: `${http}/v1/traces`, compression: "gzip" }),
  json: new JsonExporter({ url: `${http}/v1/traces` }),
};
for (const [kind, exporter] of Object.entries(exporters)) {
  const provider = new NodeTracerProvider({ resource, spanProcessors: [new BatchSpanProcessor(exporter)] });
  if (kind === "grpc") provider.register(); // once: it brings what knows the active span
  const tracer = provider.getTracer("node-test", "1.0");
  tracer.startActiveSpan(`${kind} outer`, { attributes: { count: 2 } }, (outer) => {
    tracer.startSpan(`${kind} inner`, { attributes: { texts: ["a", "b"] } }).end();
    outer.setStatus({ code: SpanStatusCode.ERROR, message: "sad" });
    outer.end();
  });
  await provider.shutdown();
}
