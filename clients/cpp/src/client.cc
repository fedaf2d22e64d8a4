#include "agl_grpc/client.hpp"

#include <openssl/sha.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "agl_grpc/lease_stream.hpp"
#include "agl_grpc/span_streamer.hpp"

namespace agl_grpc {
namespace {

constexpr char kContractVersion[] = "v1";
constexpr size_t kInlineBytes = 1 << 20;
constexpr std::chrono::milliseconds kLongestPoll{50'000};

std::shared_ptr<grpc::Channel> connect(const std::string& target, const ClientOptions& options) {
  const size_t colon = target.rfind(':');
  const std::string port = colon == std::string::npos ? "" : target.substr(colon + 1);
  const bool number = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
  if (colon == 0 || !number) {
    throw std::invalid_argument("the store's address is \"" + target +
                                "\"; it has to be host:port, for example 127.0.0.1:4747");
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  // A restarted store is found again quickly: gRPC's own default waits up to two minutes.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 250);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // what may be tried again is decided here
  // Each client has a connection of its own, as its options say.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto security = options.security ? options.security : grpc::InsecureChannelCredentials();
  return grpc::CreateCustomChannel(target, security, arguments);
}

std::mt19937_64& dice() {
  thread_local std::mt19937_64 engine{[] {
    std::random_device device;
    return (static_cast<uint64_t>(device()) << 32) | device();
  }()};
  return engine;
}

std::string hex(const unsigned char* bytes, size_t count) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < count; i++) {
    text += digits[bytes[i] >> 4];
    text += digits[bytes[i] & 15];
  }
  return text;
}

}  // namespace

std::string new_id() {
  std::random_device device;  // the system's own source: ids of two processes never meet
  unsigned char bytes[16];
  for (auto& byte : bytes) byte = static_cast<unsigned char>(device());
  return hex(bytes, sizeof bytes);
}

void mint_request_id(google::protobuf::Message* request) {
  const auto* field = request->GetDescriptor()->FindFieldByName("request_id");
  if (field == nullptr || field->type() != google::protobuf::FieldDescriptor::TYPE_STRING || field->is_repeated())
    return;
  const auto* reflection = request->GetReflection();
  if (reflection->GetString(*request, field).empty()) reflection->SetString(request, field, new_id());
}

void limit(grpc::ClientContext* context, std::chrono::nanoseconds left) {
  const gpr_timespec span = gpr_time_from_nanos(std::max<int64_t>(left.count(), 0), GPR_TIMESPAN);
  context->set_deadline(gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), span));
}

Client::Client(const std::string& target, ClientOptions options) {
  auto core = std::make_shared<Core>();
  core->channel = connect(target, options);
  core->target = target;
  core->options = std::move(options);
  core->store = v1::StoreService::NewStub(core->channel);
  core->runner = v1::RunnerService::NewStub(core->channel);
  core->trainer = v1::TrainerService::NewStub(core->channel);
  core_ = std::move(core);
}

void Client::authorise(grpc::ClientContext* context) const {
  const std::string& credential = core_->options.credential;
  if (!credential.empty()) context->AddMetadata("authorization", "Bearer " + credential);
}

bool Client::again(const Error& error, int tries, const Stop& stop,
                   std::optional<std::chrono::steady_clock::time_point> deadline) const {
  std::chrono::nanoseconds wait = error.retry_after;
  if (wait.count() == 0) {
    const double first = std::chrono::duration<double>(retry().first_wait).count();
    const double longest = std::chrono::duration<double>(retry().longest_wait).count();
    const double full = std::min(longest, first * std::pow(2.0, std::min(tries, 16)));
    const double part = std::uniform_real_distribution<double>(0.5, 1.0)(dice());
    wait = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(full * part));
  }
  if (deadline && *deadline - std::chrono::steady_clock::now() < wait) return false;
  return !stop.wait_for(wait);
}

grpc::Status Client::tried(google::protobuf::Message* response, const CallOptions& options,
                           const std::function<grpc::Status(grpc::ClientContext*)>& once) const {
  const auto deadline = std::chrono::steady_clock::now() + options.timeout.value_or(retry().timeout);
  for (int tries = 0;; tries++) {
    grpc::ClientContext context;
    limit(&context, deadline - std::chrono::steady_clock::now());
    authorise(&context);
    context.set_wait_for_ready(options.wait_for_ready);
    const auto listener = options.stop.listen([&context] { context.TryCancel(); });
    const grpc::Status status = once(&context);
    if (status.ok() || options.stop.requested()) return status;
    const Error error = error_from(status, target());
    if (!error.transient() || !again(error, tries, options.stop, deadline)) return status;
    if (response != nullptr) response->Clear();
  }
}

void Client::resumed(const std::function<Reading(grpc::ClientContext*)>& once, bool endless,
                     const CallOptions& options) const {
  using clock = std::chrono::steady_clock;
  std::optional<clock::time_point> deadline;
  if (options.timeout) deadline = clock::now() + *options.timeout;
  auto silent_since = clock::now();
  for (int tries = 0; !options.stop.requested(); tries++) {
    grpc::ClientContext context;
    if (deadline) limit(&context, *deadline - clock::now());
    authorise(&context);
    Reading reading;
    {
      const auto listener = options.stop.listen([&context] { context.TryCancel(); });
      reading = once(&context);
    }
    if (reading.enough || options.stop.requested()) return;
    if (reading.heard) tries = 0;
    if (tries == 0) silent_since = clock::now();  // a stream may be quiet for hours before it breaks
    if (reading.status.ok()) {
      if (!endless) return;
      options.stop.wait_for(retry().first_wait);
      continue;
    }
    const Error error = error_from(reading.status, target());
    if (!error.transient() || clock::now() - silent_since > retry().timeout) throw error;
    if (!again(error, tries, options.stop, deadline)) {
      if (options.stop.requested()) return;
      throw error;
    }
  }
}

v1::GetServerInfoResponse Client::require(const std::vector<std::string>& capabilities,
                                          const CallOptions& options) const {
  const auto found = call(&Store::GetServerInfo, v1::GetServerInfoRequest(), options);
  const auto& has = found.capabilities();
  std::string missing;
  for (const auto& name : capabilities) {
    if (std::find(has.begin(), has.end(), name) == has.end()) missing += (missing.empty() ? "" : ",") + name;
  }
  const bool speaks = found.contract_version() == kContractVersion;
  if (speaks && missing.empty()) return found;
  const std::string lack =
      speaks ? "lacks " + missing : "speaks contract " + found.contract_version() + ", not " + kContractVersion;
  Error error(grpc::StatusCode::UNIMPLEMENTED, "METHOD_UNIMPLEMENTED",
              "the store at " + target() + " is of version " + found.server_version() + " and " + lack);
  error.info = {{"contract_version", found.contract_version()}, {"missing", missing}};
  throw error;
}

std::vector<v1::Rollout> Client::enqueue(std::vector<v1::RolloutSpec> rollouts, const CallOptions& options) const {
  v1::EnqueueRolloutsRequest request;
  request.set_run_id(run());
  for (auto& one : rollouts) *request.add_rollouts() = std::move(one);
  auto answer = call(&Store::EnqueueRollouts, request, options);
  return {std::make_move_iterator(answer.mutable_rollouts()->begin()),
          std::make_move_iterator(answer.mutable_rollouts()->end())};
}

v1::Payload Client::payload(std::string json, const CallOptions& options) const {
  v1::Payload payload;
  if (json.size() <= kInlineBytes) {
    payload.set_data(std::move(json));
  } else {
    payload.set_blob_digest(put_blob(json, options));
  }
  return payload;
}

std::string Client::load(const v1::Payload& payload, const CallOptions& options) const {
  return payload.blob_digest().empty() ? payload.data() : get_blob(payload.blob_digest(), options);
}

std::string Client::put_blob(const std::string& data, const CallOptions& options) const {
  unsigned char hash[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(), hash);
  const std::string digest = "sha256:" + hex(hash, sizeof hash);
  const grpc::Status status = tried(nullptr, options, [&](grpc::ClientContext* context) {
    v1::PutBlobResponse answer;
    const auto stream = core_->store->PutBlob(context, &answer);
    v1::PutBlobRequest piece;
    piece.set_digest(digest);
    bool open = stream->Write(piece);
    for (size_t at = 0; open && at < data.size(); at += kInlineBytes) {
      piece.set_chunk(data.substr(at, kInlineBytes));
      open = stream->Write(piece);
    }
    stream->WritesDone();
    return stream->Finish();  // a write that failed says nothing: the status comes here
  });
  if (!status.ok()) throw error_from(status, target());
  return digest;
}

std::string Client::get_blob(const std::string& digest, const CallOptions& options) const {
  std::string data;
  CallOptions bounded = options;
  bounded.timeout = options.timeout.value_or(retry().timeout);
  const auto open = [&] {
    v1::GetBlobRequest request;
    request.set_digest(digest);
    request.set_offset(static_cast<int64_t>(data.size()));
    return request;
  };
  const auto each = [&](const v1::GetBlobResponse& piece) {
    data += piece.chunk();
    return true;
  };
  read<Store, v1::GetBlobRequest, v1::GetBlobResponse>(&Store::GetBlob, open, each, false, bounded);
  if (options.stop.requested()) {
    throw Error(grpc::StatusCode::CANCELLED, "", "reading " + digest + " was stopped");
  }
  return data;
}

std::vector<v1::Rollout> Client::wait(const std::vector<std::string>& rollout_ids, v1::WaitUntil until,
                                      const CallOptions& options) const {
  using clock = std::chrono::steady_clock;
  const auto begun = clock::now();
  v1::WaitRolloutsRequest request;
  for (const auto& id : rollout_ids) request.add_rollout_ids(id);
  request.set_until(until);
  for (;;) {
    std::chrono::nanoseconds poll = kLongestPoll;
    if (options.timeout) {
      poll = std::clamp<std::chrono::nanoseconds>(*options.timeout - (clock::now() - begun), poll.zero(), poll);
    }
    request.mutable_timeout()->set_seconds(poll.count() / 1'000'000'000);
    request.mutable_timeout()->set_nanos(static_cast<int32_t>(poll.count() % 1'000'000'000));
    CallOptions once;
    once.timeout = std::chrono::duration_cast<std::chrono::milliseconds>(poll) + retry().timeout;
    once.stop = options.stop;
    auto answer = call(&Store::WaitRollouts, request, once);
    if (answer.complete() || poll.count() == 0 || (options.timeout && clock::now() - begun >= *options.timeout)) {
      return {std::make_move_iterator(answer.mutable_rollouts()->begin()),
              std::make_move_iterator(answer.mutable_rollouts()->end())};
    }
  }
}

std::unique_ptr<LeaseStream> Client::lease(LeaseOptions options) const {
  return std::make_unique<LeaseStream>(*this, std::move(options));
}

std::unique_ptr<SpanStreamer> Client::spans(std::string producer_id) const {
  return std::make_unique<SpanStreamer>(*this, std::move(producer_id));
}

}  // namespace agl_grpc
