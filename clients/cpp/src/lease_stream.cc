#include "agl_grpc/lease_stream.hpp"

#include <algorithm>

namespace agl_grpc {
namespace {

constexpr int kTriesOfARefusedStream = 5;
constexpr std::chrono::seconds kNotPermittedWait{5};
constexpr std::chrono::hours kResultsTimeout{24};
constexpr int kRenewalsOfALease = 3;
constexpr std::chrono::milliseconds kShortestRenewal{1'000};
constexpr size_t kMostCompletions = 1000;

void name(v1::HeldLease* held, const v1::Lease& lease) {
  held->set_attempt_id(lease.attempt_id());
  held->set_lease_token(lease.lease_token());
}

}  // namespace

LeaseStream::LeaseStream(Client client, LeaseOptions options)
    : client_(std::move(client)), options_(std::move(options)), credits_(options_.credits) {
  if (options_.session_id.empty()) options_.session_id = new_id();
  running_ = std::thread([this] { run(); });
  renewing_ = std::thread([this] { renew(); });
  completing_ = std::thread([this] { complete_pending(); });
}

LeaseStream::~LeaseStream() {
  try {
    close();
  } catch (const Error&) {
    // The store takes back what was not handed back when the leases run out.
  }
}

std::optional<LeaseEvent> LeaseStream::next(std::chrono::nanoseconds limit, const Stop& stop) {
  const auto listener = stop.listen([this] {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  });
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, limit, [&] { return !events_.empty() || ended_ || stop.requested(); });
  if (!events_.empty()) {
    LeaseEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }
  if (ended_ && failure_) std::rethrow_exception(failure_);
  return std::nullopt;
}

std::map<std::string, v1::Lease> LeaseStream::held() const {
  std::lock_guard lock(mutex_);
  return held_;
}

void LeaseStream::grant(int64_t credits) {
  std::lock_guard lock(mutex_);
  credits_ += credits;
  granted_ += credits;
  v1::StreamLeasesRequest message;
  message.mutable_credit()->set_granted(granted_);
  send(std::move(message));
}

void LeaseStream::acknowledge(const v1::WorkerCommand& command) {
  std::lock_guard lock(mutex_);
  seen_[command.command_id()] = true;
  v1::StreamLeasesRequest message;
  message.mutable_ack()->add_command_ids(command.command_id());
  send(std::move(message));
}

void LeaseStream::drain(const std::string& reason) {
  std::lock_guard lock(mutex_);
  drained_ = reason;
  credits_ = 0;
  v1::StreamLeasesRequest message;
  message.mutable_drain()->set_reason(reason);
  send(std::move(message));
}

v1::Rollout LeaseStream::complete(const v1::Lease& lease, v1::Completion completion) {
  completion.set_rollout_id(lease.rollout_id());
  completion.set_attempt_id(lease.attempt_id());
  completion.set_lease_token(lease.lease_token());
  v1::Rollout rollout;
  end({lease.attempt_id()}, [&] {
    Pending one{std::move(completion), {}};
    auto done = one.done.get_future();
    {
      std::lock_guard lock(mutex_);
      if (no_more_results_) {
        throw Error(grpc::StatusCode::CANCELLED, "", "the lease stream is closed: the attempt was handed back");
      }
      pending_.push_back(std::move(one));
      changed_.notify_all();
    }
    rollout = done.get();
  });
  return rollout;
}

std::vector<std::optional<Error>> LeaseStream::release(const std::string& reason, const std::vector<v1::Lease>& leases,
                                                       const CallOptions& options) {
  std::vector<std::optional<Error>> outcomes;
  if (leases.empty()) return outcomes;
  v1::ReleaseAttemptsRequest request;
  request.set_worker_id(options_.worker_id);
  request.set_reason(reason);
  std::vector<std::string> ids;
  for (const auto& lease : leases) {
    ids.push_back(lease.attempt_id());
    name(request.add_leases(), lease);
  }
  end(ids, [&] {
    const auto answer = client_.call(&Runner::ReleaseAttempts, request, options);
    for (const auto& result : answer.results()) {
      outcomes.push_back(result.has_error() ? std::make_optional(error_from(result.error())) : std::nullopt);
    }
  });
  return outcomes;
}

void LeaseStream::close(std::chrono::milliseconds limit) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    no_more_results_ = true;
    changed_.notify_all();
  }
  stop_.request();
  running_.join();
  renewing_.join();
  completing_.join();
  std::vector<v1::Lease> left;
  for (const auto& [id, lease] : held()) left.push_back(lease);
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }
  CallOptions options;
  options.timeout = limit;
  release("the worker left", left, options);
}

template <typename Call>
void LeaseStream::end(const std::vector<std::string>& ids, Call call) {
  const auto ended = [&](bool over) {
    std::lock_guard lock(mutex_);
    for (const auto& id : ids) {
      ending_.erase(id);
      if (over) held_.erase(id);
    }
  };
  {
    // A renewal that crosses the call finds the lease over: that is no loss.
    std::lock_guard lock(mutex_);
    ending_.insert(ids.begin(), ids.end());
  }
  try {
    call();
  } catch (const Error& error) {
    ended(error.is(v1::ERROR_REASON_LEASE_LOST) || error.is(v1::ERROR_REASON_ENTITY_NOT_FOUND) ||
          error.is(v1::ERROR_REASON_ILLEGAL_TRANSITION));
    throw;
  }
  ended(true);
}

void LeaseStream::complete_pending() {
  for (;;) {
    std::vector<Pending> batch;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !pending_.empty() || no_more_results_; });
      if (pending_.empty()) return;
      while (!pending_.empty() && batch.size() < kMostCompletions) {
        batch.push_back(std::move(pending_.front()));
        pending_.pop_front();
      }
    }
    complete_batch(batch);
  }
}

void LeaseStream::complete_batch(std::vector<Pending>& batch) {
  v1::CompleteAttemptsRequest request;
  request.set_worker_id(options_.worker_id);
  for (auto& one : batch) *request.add_completions() = one.completion;
  CallOptions options;
  options.timeout = kResultsTimeout;
  options.stop = stop_;
  try {
    auto answer = client_.call(&Runner::CompleteAttempts, request, options);
    for (size_t index = 0; index < batch.size(); index++) {
      auto* result = answer.mutable_results(static_cast<int>(index));
      if (result->has_error()) {
        batch[index].done.set_exception(std::make_exception_ptr(error_from(result->error())));
      } else {
        batch[index].done.set_value(std::move(*result->mutable_rollout()));
      }
    }
  } catch (const Error& error) {
    for (auto& one : batch) one.done.set_exception(std::make_exception_ptr(error));
  }
}

void LeaseStream::run() {
  int refusals = 0;
  for (int tries = 0; !stop_.requested(); tries++) {
    const grpc::Status status = session();
    if (stop_.requested()) return;
    const Error error = error_from(status, client_.target());
    const bool connected = disconnected(status.ok() ? "the store ended the stream" : error.what());
    if (connected) tries = 0;
    if (error.code == grpc::StatusCode::PERMISSION_DENIED) {
      // A grant may come or come back: wait for it, and say so.
      push(Idle{std::string("not permitted: ") + error.what()});
      stop_.wait_for(kNotPermittedWait);
      continue;
    }
    refusals = status.ok() || error.transient() || connected ? 0 : refusals + 1;
    if (refusals >= kTriesOfARefusedStream) {
      fail(error);
      return;
    }
    client_.again(error, tries, stop_, std::nullopt);
  }
}

void LeaseStream::fail(const Error& error) {
  {
    std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::make_exception_ptr(error);
    ended_ = true;
    changed_.notify_all();
  }
  stop_.request();
}

void LeaseStream::push(LeaseEvent event) {
  std::lock_guard lock(mutex_);
  events_.push_back(std::move(event));
  changed_.notify_all();
}

bool LeaseStream::disconnected(const std::string& why) {
  bool was;
  {
    std::lock_guard lock(mutex_);
    was = connected_;
    connected_ = false;
  }
  if (was) push(Disconnected{why});
  return was;
}

grpc::Status LeaseStream::session() {
  grpc::ClientContext context;
  client_.authorise(&context);
  const auto listener = stop_.listen([&context] { context.TryCancel(); });
  const auto stream = client_.stub(static_cast<Runner*>(nullptr)).StreamLeases(&context);
  const auto outgoing = open();
  std::thread writer([&] { write(stream.get(), outgoing); });
  v1::StreamLeasesResponse response;
  while (stream->Read(&response)) receive(response);
  {
    std::lock_guard lock(mutex_);
    outgoing->closed = true;
    changed_.notify_all();
  }
  writer.join();
  return stream->Finish();
}

void LeaseStream::write(grpc::ClientReaderWriterInterface<v1::StreamLeasesRequest, v1::StreamLeasesResponse>* stream,
                        const std::shared_ptr<Outgoing>& outgoing) {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return outgoing->closed || !outgoing->messages.empty(); });
    if (outgoing->closed) return;
    const v1::StreamLeasesRequest message = std::move(outgoing->messages.front());
    outgoing->messages.pop_front();
    lock.unlock();
    if (!stream->Write(message)) return;  // the reader of the same call learns its status
    lock.lock();
  }
}

std::shared_ptr<LeaseStream::Outgoing> LeaseStream::open() {
  std::lock_guard lock(mutex_);
  outgoing_ = std::make_shared<Outgoing>();
  granted_ = credits_;
  v1::StreamLeasesRequest message;
  auto* opening = message.mutable_open();
  opening->set_worker_id(options_.worker_id);
  opening->set_session_id(options_.session_id);
  opening->set_granted(granted_);
  auto* work = opening->mutable_work();
  work->set_run_id(client_.run());
  for (const auto& queue : options_.queues) work->add_queues(queue);
  for (const auto& [key, value] : options_.labels) {
    auto* label = work->add_labels();
    label->set_key(key);
    label->set_value(value);
  }
  work->mutable_lease_duration()->set_seconds(options_.lease.count() / 1000);
  work->mutable_lease_duration()->set_nanos(static_cast<int32_t>(options_.lease.count() % 1000 * 1'000'000));
  for (const auto& [id, lease] : held_) name(opening->add_held(), lease);
  send(std::move(message));
  if (drained_) {
    message.mutable_drain()->set_reason(*drained_);
    send(std::move(message));
  }
  return outgoing_;
}

void LeaseStream::send(v1::StreamLeasesRequest message) {
  if (!outgoing_) return;
  outgoing_->messages.push_back(std::move(message));
  changed_.notify_all();
}

void LeaseStream::receive(v1::StreamLeasesResponse& response) {
  if (response.has_opened()) {
    {
      std::lock_guard lock(mutex_);
      connected_ = true;
    }
    push(Connected{});
    for (const auto& id : response.opened().lost_attempt_ids()) lose(id, "the store gave it up");
  } else if (response.has_delivery()) {
    for (auto& work : *response.mutable_delivery()->mutable_rollouts()) deliver(work);
  } else if (response.has_commands()) {
    command(response.commands().commands());
  } else if (response.has_idle()) {
    push(Idle{response.idle().reason()});
  }
}

void LeaseStream::deliver(v1::LeasedRollout& work) {
  std::lock_guard lock(mutex_);
  if (credits_ > 0) credits_--;
  held_[work.lease().attempt_id()] = work.lease();
  events_.push_back(Delivered{std::move(work)});
  changed_.notify_all();
}

void LeaseStream::lose(const std::string& attempt_id, const std::string& why) {
  std::lock_guard lock(mutex_);
  if (ending_.count(attempt_id) || !held_.erase(attempt_id)) return;
  events_.push_back(Lost{attempt_id, why});
  changed_.notify_all();
}

void LeaseStream::command(const google::protobuf::RepeatedPtrField<v1::WorkerCommand>& commands) {
  for (const auto& command : commands) {
    bool fresh, acknowledged;
    {
      std::lock_guard lock(mutex_);
      const auto [place, made] = seen_.emplace(command.command_id(), false);
      fresh = made;
      acknowledged = place->second;
    }
    if (acknowledged) {
      acknowledge(command);  // that answer was lost with a stream
    } else if (fresh) {
      push(Commanded{command});
    }
  }
}

void LeaseStream::renew() {
  for (;;) {
    std::chrono::nanoseconds shortest;
    renewable(&shortest);
    if (stop_.wait_for(shortest / kRenewalsOfALease)) return;
    const auto request = renewable(&shortest);
    if (request.leases().empty()) continue;
    try {
      renew_once(request, shortest);
    } catch (const Error& error) {
      if (stop_.requested()) return;
      if (!error.transient() && error.code != grpc::StatusCode::DEADLINE_EXCEEDED) {
        fail(error);
        return;
      }
    }
  }
}

v1::RenewLeasesRequest LeaseStream::renewable(std::chrono::nanoseconds* shortest) const {
  std::lock_guard lock(mutex_);
  v1::RenewLeasesRequest request;
  request.set_worker_id(options_.worker_id);
  *shortest = options_.lease;
  for (const auto& [id, lease] : held_) {
    name(request.add_leases(), lease);
    if (!lease.has_duration()) continue;
    const std::chrono::nanoseconds duration =
        std::chrono::seconds(lease.duration().seconds()) + std::chrono::nanoseconds(lease.duration().nanos());
    *shortest = std::min(*shortest, duration);
  }
  return request;
}

void LeaseStream::renew_once(const v1::RenewLeasesRequest& request, std::chrono::nanoseconds shortest) {
  CallOptions options;
  // No longer than until the next is due: within one call the waits between tries grow, and could outlast a lease.
  options.timeout =
      std::max(kShortestRenewal, std::chrono::duration_cast<std::chrono::milliseconds>(shortest / kRenewalsOfALease));
  options.stop = stop_;
  options.wait_for_ready = true;  // a store that is back has given the leases their own time anew, and no more
  const auto answer = client_.call(&Runner::RenewLeases, request, options);
  for (const auto& renewal : answer.renewals()) {
    if (renewal.has_error()) lose(renewal.attempt_id(), error_from(renewal.error()).what());
  }
  command(answer.commands());
}

}  // namespace agl_grpc
