#include "agl_grpc/client.hpp"

namespace agl_grpc {

int64_t Client::position(const CallOptions& options) const {
  v1::GetLatestResourcesRequest request;
  request.set_run_id(run());
  try {
    return call(&Store::GetLatestResources, request, options).position();
  } catch (const Error&) {
    if (options.stop.requested()) return 0;  // the watch ends before it begins
    throw;
  }
}

void Client::watch_rollouts(v1::WatchRolloutsRequest request,
                            const std::function<bool(const v1::WatchRolloutsResponse&)>& each,
                            const CallOptions& options) const {
  // "From now on" is fixed here: a stream that breaks before its first message leaves no gap.
  if (request.cursor() == 0 && !request.include_existing()) request.set_cursor(position(options));
  const auto open = [&] { return request; };
  const auto noted = [&](const v1::WatchRolloutsResponse& message) {
    // Without a cursor it is what was there already: after a break all of it comes again.
    if (message.cursor() != 0) {
      request.set_cursor(message.cursor());
      request.set_include_existing(false);
    }
    return each(message);
  };
  read<Store, v1::WatchRolloutsRequest, v1::WatchRolloutsResponse>(&Store::WatchRollouts, open, noted, true, options);
}

void Client::watch_attempts(v1::WatchAttemptsRequest request,
                            const std::function<bool(const v1::WatchAttemptsResponse&)>& each,
                            const CallOptions& options) const {
  if (request.run_id().empty()) request.set_run_id(run());
  if (request.cursor() == 0) request.set_cursor(position(options));
  const auto open = [&] { return request; };
  const auto noted = [&](const v1::WatchAttemptsResponse& message) {
    request.set_cursor(message.cursor());
    return each(message);
  };
  read<Store, v1::WatchAttemptsRequest, v1::WatchAttemptsResponse>(&Store::WatchAttempts, open, noted, true, options);
}

void Client::watch_spans(v1::WatchSpansRequest request, const std::function<bool(const v1::WatchSpansResponse&)>& each,
                         const CallOptions& options) const {
  if (request.run_id().empty()) request.set_run_id(run());
  if (request.cursor() == 0) request.set_cursor(position(options));
  const auto open = [&] { return request; };
  const auto noted = [&](const v1::WatchSpansResponse& message) {
    request.set_cursor(message.cursor());
    return each(message);
  };
  read<Store, v1::WatchSpansRequest, v1::WatchSpansResponse>(&Store::WatchSpans, open, noted, true, options);
}

void Client::watch_resources(v1::WatchResourcesRequest request,
                             const std::function<bool(const v1::WatchResourcesResponse&)>& each,
                             const CallOptions& options) const {
  if (request.run_id().empty()) request.set_run_id(run());
  if (request.cursor() == 0 && !request.include_latest()) request.set_cursor(position(options));
  const auto open = [&] { return request; };
  const auto noted = [&](const v1::WatchResourcesResponse& message) {
    if (message.cursor() != 0) {
      request.set_cursor(message.cursor());
      request.set_include_latest(false);
    }
    return each(message);
  };
  read<Store, v1::WatchResourcesRequest, v1::WatchResourcesResponse>(&Store::WatchResources, open, noted, true,
                                                                     options);
}

void Client::export_spans(v1::ExportSpansRequest request,
                          const std::function<bool(const v1::ExportSpansResponse&)>& each,
                          const CallOptions& options) const {
  if (request.run_id().empty()) request.set_run_id(run());
  const auto open = [&] { return request; };
  const auto noted = [&](const v1::ExportSpansResponse& message) {
    request.set_cursor(message.cursor());
    return each(message);
  };
  read<Store, v1::ExportSpansRequest, v1::ExportSpansResponse>(&Store::ExportSpans, open, noted, false, options);
}

}  // namespace agl_grpc
