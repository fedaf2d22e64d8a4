#include "agl_grpc/worker.hpp"

#include <cxxabi.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <typeinfo>

#include "text.hpp"

namespace agl_grpc {
namespace {

constexpr std::chrono::seconds kHeartbeatEvery{10};
constexpr std::chrono::seconds kStopWithin{2};
constexpr std::chrono::seconds kTimeoutMargin{1};
constexpr std::chrono::seconds kLastWords{10};
constexpr size_t kLongestMessage = 1000;

std::atomic<int> signal_pipe{-1};

extern "C" void on_signal(int) {
  const int before = errno;
  [[maybe_unused]] const auto written = write(signal_pipe, "s", 1);
  errno = before;
}

// While it lives, SIGINT and SIGTERM request a stop instead of ending the process.
class Signals {
 public:
  explicit Signals(Stop stop) {
    if (pipe2(pipe_, O_CLOEXEC | O_NONBLOCK) != 0) throw std::runtime_error("no pipe for signals can be made");
    fcntl(pipe_[0], F_SETFL, 0);  // the reader waits; a signal never does
    before_ = signal_pipe.exchange(pipe_[1]);
    struct sigaction action = {};
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, &interrupt_);
    sigaction(SIGTERM, &action, &terminate_);
    reader_ = std::thread([this, stop] {
      char found = 0;
      while (read(pipe_[0], &found, 1) != 1) {
      }
      if (found == 's') stop.request();
    });
  }
  ~Signals() {
    sigaction(SIGINT, &interrupt_, nullptr);
    sigaction(SIGTERM, &terminate_, nullptr);
    signal_pipe = before_;
    [[maybe_unused]] const auto written = write(pipe_[1], "e", 1);
    reader_.join();
    close(pipe_[0]);
    close(pipe_[1]);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

 private:
  int pipe_[2];
  int before_ = -1;
  struct sigaction interrupt_ = {}, terminate_ = {};
  std::thread reader_;
};

std::string name_of(const std::exception& error) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(typeid(error).name(), nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : typeid(error).name();
}

v1::Failure failure(v1::FailureKind kind, const std::string& type, const std::string& text) {
  v1::Failure made;
  made.set_kind(kind);
  made.set_type(type);
  made.set_message(first_line(text, kLongestMessage));
  return made;
}

std::string seconds_of(const google::protobuf::Duration& duration) {
  char text[64];
  std::snprintf(text, sizeof text, "%gs", static_cast<double>(duration.seconds()) + duration.nanos() / 1e9);
  return text;
}

}  // namespace

// What agents that were left behind may still touch.
struct Worker::Shared {
  Shared(Client c, Agent a, WorkerOptions o) : client(std::move(c)), agent(std::move(a)), options(std::move(o)) {}

  Client client;
  Agent agent;
  WorkerOptions options;
  std::unique_ptr<LeaseStream> stream;
  std::shared_ptr<SpanStreamer> spans;

  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, Stop> running;  // attempts whose result is wanted
  int agents = 0;
  int64_t granted = 0;
  int64_t ended = 0;
  bool left = false;  // the stream is closed
  std::string idle = "connecting";
  bool beat_now = false;
  Stop done;  // requested when max_rollouts are finished, or the worker is told to leave

  void say(const std::string& reason) {
    std::lock_guard lock(mutex);
    beat_now = beat_now || idle != reason;
    idle = reason;
    changed.notify_all();
  }

  void halt(const std::string& attempt_id, const std::string& reason) {
    std::optional<Stop> stop;
    {
      std::lock_guard lock(mutex);
      const auto found = running.find(attempt_id);
      if (found == running.end()) return;
      stop = found->second;
      running.erase(found);  // nothing more is to be said of it
    }
    options.log("attempt " + attempt_id + " is stopped: " + reason);
    stop->request();
  }

  void finished(const std::string& attempt_id) {
    std::lock_guard lock(mutex);
    running.erase(attempt_id);
    ended++;
    agents--;
    if (!left && (options.max_rollouts == 0 || granted < options.max_rollouts)) {
      granted++;
      stream->grant(1);
    } else if (ended == options.max_rollouts) {
      done.request();
    }
    changed.notify_all();
  }

  void beat() {
    std::unique_lock lock(mutex);
    while (!left) {
      changed.wait_for(lock, kHeartbeatEvery, [this] { return left || beat_now; });
      if (left) return;
      beat_now = false;
      v1::HeartbeatRequest request;
      request.set_worker_id(options.work.worker_id);
      request.set_status(running.empty() ? v1::WORKER_STATUS_IDLE : v1::WORKER_STATUS_BUSY);
      if (running.empty()) request.set_idle_reason(idle);
      lock.unlock();
      heartbeat(request);
      lock.lock();
    }
  }

  void heartbeat(v1::HeartbeatRequest& request) {
    struct rusage usage = {};
    getrusage(RUSAGE_SELF, &usage);
    *request.add_stats() = value("memory.peak_bytes", usage.ru_maxrss * 1024L);
    *request.add_stats() = value("pid", static_cast<long>(getpid()));
    *request.add_stats() = value("runtime", "C++, gRPC " + grpc::Version());
    CallOptions limits;
    limits.timeout = kHeartbeatEvery;
    limits.stop = gone;
    try {
      client.call(&Runner::Heartbeat, request, limits);
    } catch (const Error& error) {
      if (!error.transient() && !gone.requested()) options.log(std::string("no heartbeat: ") + error.what());
    }
  }

  Stop gone;  // requested when the worker has left
};

Worker::Worker(Client client, Agent agent, WorkerOptions options) {
  if (!options.log) options.log = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  LeaseOptions& work = options.work;
  if (work.worker_id.empty()) {
    char host[256] = "host";
    gethostname(host, sizeof host - 1);
    work.worker_id = std::string(host) + "-cpp-" + std::to_string(getpid()) + "-" + new_id().substr(0, 8);
  }
  if (work.credits == 0) work.credits = 1;
  if (options.max_rollouts > 0) work.credits = std::min(work.credits, options.max_rollouts);
  shared_ = std::make_shared<Shared>(std::move(client), std::move(agent), std::move(options));
}

void Worker::run(const Stop& stop) {
  Shared& shared = *shared_;
  const auto told = stop.listen([state = shared_] { state->done.request(); });
  std::optional<Signals> signals;
  if (shared.options.signals) signals.emplace(shared.done);
  shared.granted = shared.options.work.credits;
  shared.spans = shared.client.spans(shared.options.work.worker_id + "/" + new_id());
  shared.stream = shared.client.lease(shared.options.work);
  std::thread beats([state = shared_] { state->beat(); });
  std::exception_ptr failed;
  const auto attempt = [&failed](const std::function<void()>& step) {
    try {
      step();
    } catch (const Error&) {
      if (!failed) failed = std::current_exception();
    }
  };
  attempt([&] {
    for (bool leave = false; !leave && !shared.done.requested();) {
      auto event = shared.stream->next(std::chrono::hours(1), shared.done);
      if (event) leave = react(*event);
    }
  });
  if (shared.done.requested()) shared.stream->drain("told to leave");
  finish();
  attempt([&] { shared.spans->close(kLastWords); });
  attempt([&] { shared.stream->close(kLastWords); });
  {
    std::lock_guard lock(shared.mutex);
    shared.left = true;
    shared.changed.notify_all();
  }
  shared.gone.request();
  beats.join();
  if (failed) std::rethrow_exception(failed);
}

// Answers whether the worker leaves.
bool Worker::react(LeaseEvent& event) {
  Shared& shared = *shared_;
  if (auto* delivered = std::get_if<Delivered>(&event)) {
    take(std::move(delivered->work));
  } else if (const auto* lost = std::get_if<Lost>(&event)) {
    shared.halt(lost->attempt_id, "its lease was lost: " + lost->why);
  } else if (const auto* commanded = std::get_if<Commanded>(&event)) {
    return obey(commanded->command);
  } else if (const auto* idle = std::get_if<Idle>(&event)) {
    shared.say(idle->reason);
  } else if (std::holds_alternative<Connected>(event)) {
    shared.options.log(shared.options.work.worker_id + " is connected to the store at " + shared.client.target());
    shared.say("no work");
  } else if (const auto* disconnected = std::get_if<Disconnected>(&event)) {
    shared.options.log("the store is away (" + disconnected->why + "): results are kept");
    shared.say("the store is away");
  }
  return false;
}

bool Worker::obey(const v1::WorkerCommand& command) {
  Shared& shared = *shared_;
  if (command.kind() == v1::COMMAND_KIND_CANCEL) shared.halt(command.attempt_id(), "cancelled: " + command.reason());
  shared.stream->acknowledge(command);
  if (command.kind() != v1::COMMAND_KIND_DRAIN) return false;
  shared.stream->drain(command.reason());
  return true;
}

void Worker::take(v1::LeasedRollout work) {
  Stop stop;
  const std::string id = work.lease().attempt_id();
  auto task = std::make_shared<Task>(std::move(work), shared_->spans, stop);
  {
    std::lock_guard lock(shared_->mutex);
    shared_->running.emplace(id, stop);
    shared_->agents++;
  }
  std::thread([state = shared_, task, id] {
    try {
      attend(state, task);
    } catch (const Error& error) {
      state->options.log("attempt " + id + ": its result was not taken: " + error.what());
    }
    state->finished(id);
  }).detach();  // counted in agents: finish() waits for it
}

// Waits for the agents that run; those that are left when the grace is over are told to stop.
void Worker::finish() {
  Shared& shared = *shared_;
  std::unique_lock lock(shared.mutex);
  const auto idle = [&shared] { return shared.agents == 0; };
  if (shared.changed.wait_for(lock, shared.options.grace, idle)) return;
  const auto running = std::move(shared.running);
  shared.running.clear();
  lock.unlock();
  for (const auto& [id, stop] : running) stop.request();
  lock.lock();
  shared.changed.wait_for(lock, kStopWithin, idle);
}

void Worker::attend(const std::shared_ptr<Shared>& shared, const std::shared_ptr<Task>& task) {
  const auto& lease = task->work_.lease();
  std::optional<v1::Failure> failed;
  try {
    CallOptions options;
    options.stop = task->stop_;
    task->input_ = shared->client.load(task->rollout().input(), options);
    failed = execute(shared, task);
  } catch (const Error& error) {
    failed = failure(v1::FAILURE_KIND_INFRASTRUCTURE, name_of(error), error.what());
  }
  {
    std::lock_guard lock(shared->mutex);
    if (!shared->running.count(lease.attempt_id())) return;
  }
  v1::Completion completion;
  completion.set_status(failed ? v1::ATTEMPT_STATUS_FAILED : v1::ATTEMPT_STATUS_SUCCEEDED);
  if (failed) *completion.mutable_failure() = std::move(*failed);
  {
    std::lock_guard lock(task->mutex_);
    for (auto& reward : task->rewards_) *completion.add_rewards() = reward;
  }
  shared->stream->complete(lease, std::move(completion));
}

// The agent runs here, unless it has a time limit: then on a thread that can be left behind.
std::optional<v1::Failure> Worker::execute(const std::shared_ptr<Shared>& shared, const std::shared_ptr<Task>& task) {
  if (!task->rollout().config().has_timeout()) return call(shared->agent, *task);
  const auto& limit = task->rollout().config().timeout();
  const Stop stopped = task->stop_;
  const Stop timed = Stop::child_of(stopped);
  task->stop_ = timed;
  struct Outcome {
    Stop ended;
    std::optional<v1::Failure> failed;
  };
  const auto outcome = std::make_shared<Outcome>();
  std::thread([shared, task, outcome] {
    outcome->failed = call(shared->agent, *task);
    outcome->ended.request();
  }).detach();
  const auto told = stopped.listen([outcome] { outcome->ended.request(); });
  const auto span = std::chrono::seconds(limit.seconds()) + std::chrono::nanoseconds(limit.nanos());
  const bool in_time = outcome->ended.wait_for(span);
  if (stopped.requested()) return std::nullopt;  // nothing is reported
  if (in_time) return outcome->failed;
  timed.request();
  // The store's own timer ends the attempt first, unless the store is away.
  stopped.wait_for(kTimeoutMargin);
  return failure(v1::FAILURE_KIND_TRUNCATED, "timeout",
                 "the attempt took longer than its timeout of " + seconds_of(limit));
}

std::optional<v1::Failure> Worker::call(const Agent& agent, Task& task) {
  try {
    agent(task);
    return std::nullopt;
  } catch (const std::exception& error) {
    return failure(v1::FAILURE_KIND_AGENT, name_of(error), error.what());
  } catch (...) {
    return failure(v1::FAILURE_KIND_AGENT, "unknown", "the agent threw what is no std::exception");
  }
}

}  // namespace agl_grpc
