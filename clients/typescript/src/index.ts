// agl-grpc for Node.js: the contract's services, and what a client does on top of them.

export { Connection, type ConnectionOptions } from "./connection.js";
export { StoreClient, type StreamOptions, type Task } from "./client.js";
export { LeaseStream, type LeaseEvent, type LeaseStreamOptions, type Result } from "./lease_stream.js";
export { SpanStreamer, type SpanAck, type SpanGroup, type SpanRejection, type SpanStreamerOptions } from "./span_streamer.js";
export { Worker, type Agent, type AgentContext, type AgentResult, type WorkerOptions } from "./worker.js";
export { attemptUrl, bindModel, type Model } from "./resources.js";
export { DEFAULT_RETRY, type RetryPolicy } from "./retry.js";
export * from "./errors.js";
export * from "./values.js";
export { StoreService } from "./gen/agl_grpc/v1/store_service_pb.js";
export { RunnerService } from "./gen/agl_grpc/v1/runner_service_pb.js";
export { TrainerService } from "./gen/agl_grpc/v1/trainer_service_pb.js";
