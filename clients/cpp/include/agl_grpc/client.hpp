// The client of a store: every rpc of the contract, with what all calls have in common.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agl_grpc/error.hpp"
#include "agl_grpc/stop.hpp"
#include "agl_grpc/v1/runner_service.grpc.pb.h"
#include "agl_grpc/v1/store_service.grpc.pb.h"
#include "agl_grpc/v1/trainer_service.grpc.pb.h"

namespace agl_grpc {

/// The contract's services; a call names its rpc by them: client.call(&Store::GetRollout, request).
using Store = v1::StoreService::StubInterface;
using Runner = v1::RunnerService::StubInterface;
using Trainer = v1::TrainerService::StubInterface;

/// How long and how often a call is tried again. Waits start at first_wait and double up to longest_wait,
/// each shortened at random so that many clients do not come back in step.
struct RetryPolicy {
  /// Bounds one logical call with all its tries, where the call names no limit of its own.
  std::chrono::milliseconds timeout{120'000};
  std::chrono::milliseconds first_wait{50};
  std::chrono::milliseconds longest_wait{2'000};
};

/// How a client connects.
struct ClientOptions {
  /// The run that helpers use.
  std::string run = "default";
  /// Sent as a bearer credential; empty = none.
  std::string credential;
  /// Encrypts the connection, for example grpc::SslCredentials({}); null = plain text.
  std::shared_ptr<grpc::ChannelCredentials> security;
  RetryPolicy retry;
};

/// What one call may differ in.
struct CallOptions {
  /// Bounds the call with all its tries; none = RetryPolicy::timeout. Watches have no limit unless given one.
  std::optional<std::chrono::milliseconds> timeout = std::nullopt;
  /// Ends the call early, with CANCELLED.
  Stop stop = Stop();
  /// Waits for a connection, within the limit, rather than between tries: the call goes out the moment the store is
  /// back.
  bool wait_for_ready = false;
};

class LeaseStream;
struct LeaseOptions;
class SpanStreamer;

/// A client of one store. Copies share the connection; it may be used from any thread.
class Client {
 public:
  /// A client of the store at ``host:port``; it connects at the first call. Throws std::invalid_argument
  /// when the address is none.
  explicit Client(const std::string& target, ClientOptions options = {});

  const std::string& target() const { return core_->target; }
  const std::string& run() const { return core_->options.run; }
  const RetryPolicy& retry() const { return core_->options.retry; }

  /// The connection, for calls by name; such calls prepare their context with ``authorise``.
  std::shared_ptr<grpc::Channel> channel() const { return core_->channel; }
  void authorise(grpc::ClientContext* context) const;

  /// The services' stubs, for calls of your own making; they do not retry.
  Store& stub(Store*) const { return *core_->store; }
  Runner& stub(Runner*) const { return *core_->runner; }
  Trainer& stub(Trainer*) const { return *core_->trainer; }

  /// Calls a unary rpc. The request id is minted once and kept over all tries; the call is tried again
  /// while that may help, and throws Error in the end.
  template <typename Service, typename Request, typename Response>
  Response call(grpc::Status (Service::*rpc)(grpc::ClientContext*, const Request&, Response*), const Request& request,
                const CallOptions& options = {}) const;

  /// Reads a server stream to its end, opening it again after each break; ``open`` is asked for the request to go
  /// on with. ``each`` answers false to end it. An endless stream is opened again too when the server ends it.
  /// A store that stays away longer than RetryPolicy::timeout ends it with an error.
  template <typename Service, typename Request, typename Response>
  void read(std::unique_ptr<grpc::ClientReaderInterface<Response>> (Service::*rpc)(grpc::ClientContext*,
                                                                                   const Request&),
            const std::function<Request()>& open, const std::function<bool(const Response&)>& each, bool endless,
            const CallOptions& options = {}) const;

  /// Makes sure that the server speaks this contract and has these capabilities, and answers what it is. Else throws
  /// Error with METHOD_UNIMPLEMENTED; ``info`` has its "contract_version" and, in "missing", what it lacks, with
  /// commas between them.
  v1::GetServerInfoResponse require(const std::vector<std::string>& capabilities = {},
                                    const CallOptions& options = {}) const;

  /// Puts rollouts into their queues, all or none.
  std::vector<v1::Rollout> enqueue(std::vector<v1::RolloutSpec> rollouts, const CallOptions& options = {}) const;

  /// JSON as a payload; above 1 MiB it is stored as a blob.
  v1::Payload payload(std::string json, const CallOptions& options = {}) const;
  /// A payload's JSON, from its blob if need be; empty when there is none.
  std::string load(const v1::Payload& payload, const CallOptions& options = {}) const;
  /// Stores bytes under the hash of their content; answers "sha256:…".
  std::string put_blob(const std::string& data, const CallOptions& options = {}) const;
  std::string get_blob(const std::string& digest, const CallOptions& options = {}) const;

  /// Waits until all rollouts are finished (or sealed), or the limit is over, and answers what is
  /// finished; unknown ids are ignored. Without a limit it waits for ever.
  std::vector<v1::Rollout> wait(const std::vector<std::string>& rollout_ids,
                                v1::WaitUntil until = v1::WAIT_UNTIL_TERMINAL, const CallOptions& options = {}) const;

  /// Calls back for what changes until ``each`` answers false or the options' stop or limit ends it (a limit
  /// with DEADLINE_EXCEEDED, a stop quietly). After a break a watch goes on without a gap or a repeat. Without
  /// a cursor it begins now.
  void watch_rollouts(v1::WatchRolloutsRequest request,
                      const std::function<bool(const v1::WatchRolloutsResponse&)>& each,
                      const CallOptions& options = {}) const;
  void watch_attempts(v1::WatchAttemptsRequest request,
                      const std::function<bool(const v1::WatchAttemptsResponse&)>& each,
                      const CallOptions& options = {}) const;
  void watch_spans(v1::WatchSpansRequest request, const std::function<bool(const v1::WatchSpansResponse&)>& each,
                   const CallOptions& options = {}) const;
  void watch_resources(v1::WatchResourcesRequest request,
                       const std::function<bool(const v1::WatchResourcesResponse&)>& each,
                       const CallOptions& options = {}) const;
  /// Calls back for the spans of many rollouts, once through.
  void export_spans(v1::ExportSpansRequest request, const std::function<bool(const v1::ExportSpansResponse&)>& each,
                    const CallOptions& options = {}) const;

  /// Starts taking work.
  std::unique_ptr<LeaseStream> lease(LeaseOptions options) const;
  /// Starts a producer of spans. Two with one producer id fence each other; empty = a new one.
  std::unique_ptr<SpanStreamer> spans(std::string producer_id = "") const;

  /// Waits before another try as the policy says; false when the limit or the stop comes first.
  bool again(const Error& error, int tries, const Stop& stop,
             std::optional<std::chrono::steady_clock::time_point> deadline) const;

 private:
  struct Core {
    std::string target;
    ClientOptions options;
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<Store> store;
    std::unique_ptr<Runner> runner;
    std::unique_ptr<Trainer> trainer;
  };

  grpc::Status tried(google::protobuf::Message* response, const CallOptions& options,
                     const std::function<grpc::Status(grpc::ClientContext*)>& once) const;
  /// One reading of a stream that may break: what ended it, and whether anything came.
  struct Reading {
    grpc::Status status;
    bool heard = false;
    bool enough = false;
  };
  void resumed(const std::function<Reading(grpc::ClientContext*)>& once, bool endless,
               const CallOptions& options) const;
  int64_t position(const CallOptions& options) const;

  std::shared_ptr<const Core> core_;
};

/// 32 random hexadecimal digits.
std::string new_id();

/// Fills an empty field ``request_id``, where the message has one.
void mint_request_id(google::protobuf::Message* request);

/// Bounds a context by a limit that does not depend on the machine's clock.
void limit(grpc::ClientContext* context, std::chrono::nanoseconds left);

template <typename Service, typename Request, typename Response>
Response Client::call(grpc::Status (Service::*rpc)(grpc::ClientContext*, const Request&, Response*),
                      const Request& request, const CallOptions& options) const {
  Service& service = stub(static_cast<Service*>(nullptr));
  Response response;
  Request sent = request;
  mint_request_id(&sent);
  const grpc::Status status =
      tried(&response, options, [&](grpc::ClientContext* context) { return (service.*rpc)(context, sent, &response); });
  if (!status.ok()) throw error_from(status, core_->target);
  return response;
}

template <typename Service, typename Request, typename Response>
void Client::read(std::unique_ptr<grpc::ClientReaderInterface<Response>> (Service::*rpc)(grpc::ClientContext*,
                                                                                         const Request&),
                  const std::function<Request()>& open, const std::function<bool(const Response&)>& each, bool endless,
                  const CallOptions& options) const {
  Service& service = stub(static_cast<Service*>(nullptr));
  resumed(
      [&](grpc::ClientContext* context) {
        Reading reading;
        const auto stream = (service.*rpc)(context, open());
        for (Response response; stream->Read(&response); response.Clear()) {
          reading.heard = true;
          if (!each(response)) {
            reading.enough = true;
            context->TryCancel();
            break;
          }
        }
        reading.status = stream->Finish();
        return reading;
      },
      endless, options);
}

}  // namespace agl_grpc
