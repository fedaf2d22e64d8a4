// A worker that runs a function as an agent.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agl_grpc/client.hpp"
#include "agl_grpc/lease_stream.hpp"
#include "agl_grpc/span_streamer.hpp"
#include "agl_grpc/values.hpp"

namespace agl_grpc {

/// A model endpoint: what an OpenAI client needs.
struct Model {
  std::string name;
  std::string base_url;
  std::string model;
  std::string api_key;
  Values sampling_parameters;
};

/// The interceptor's base URL for one attempt: …/rollout/{rollout}/attempt/{attempt}, with a trailing /v1
/// kept at its end.
std::string attempt_url(std::string endpoint, const std::string& rollout_id, const std::string& attempt_id);

/// The first model of a set, or the one of that name, for one attempt. Behind the interceptor the URL names
/// rollout and attempt, and without a key of its own it carries the attempt's credential.
std::optional<Model> bind_model(const v1::ResourceSet& set, const v1::Lease& lease, const std::string& name = "");

/// One rollout as its agent sees it; it may be used from any thread.
class Task {
 public:
  Task(v1::LeasedRollout work, std::shared_ptr<SpanStreamer> spans, Stop stop);

  /// The task as JSON.
  const std::string& input() const { return input_; }
  const v1::Rollout& rollout() const { return work_.rollout(); }
  const v1::Attempt& attempt() const { return work_.attempt(); }
  /// Those that the rollout is bound to; empty = none were published.
  const v1::ResourceSet& resources() const { return work_.resources(); }
  /// The first model among the resources, its base URL naming this attempt.
  const std::optional<Model>& model() const { return model_; }
  /// Lets the agent call the model and append spans for this attempt, nothing else.
  const std::string& credential() const { return work_.lease().attempt_credential(); }
  /// Requested when the agent has to stop: cancelled, out of time, or its lease was lost.
  const Stop& stop() const { return stop_; }

  /// Notes a reward; name "" = primary. Throws std::invalid_argument for what is not a finite number.
  void reward(double value, const std::string& name = "");
  /// Notes a reward of a step or a span.
  void add_reward(v1::Reward reward);

  /// Stores a span of this attempt and waits until it is on disk; throws Error when it is refused.
  void emit(const std::string& name, const std::vector<v1::KeyValue>& attributes = {});

 private:
  friend class Worker;
  v1::LeasedRollout work_;
  std::string input_;
  std::optional<Model> model_;
  std::shared_ptr<SpanStreamer> spans_;
  Stop stop_;
  std::mutex mutex_;
  std::vector<v1::Reward> rewards_;
};

/// Works on a task; it notes rewards with Task::reward. An exception fails the attempt (kind AGENT).
using Agent = std::function<void(Task&)>;

/// How a worker works.
struct WorkerOptions {
  /// Which work it takes; credits is the number of rollouts at a time, default 1.
  LeaseOptions work;
  /// It leaves after so many; 0 = never.
  int64_t max_rollouts = 0;
  /// How long running agents may go on after the worker was told to leave.
  std::chrono::milliseconds grace{30'000};
  /// Whether SIGINT and SIGTERM tell it to leave; of several workers in a process one may say so.
  bool signals = true;
  /// Has one line for each thing worth knowing; default: standard error.
  std::function<void(const std::string&)> log;
};

/// Runs an agent on leased rollouts until it is told to leave.
///
/// Each agent runs on a thread of its own. One that does not heed Task::stop() is left behind when its time
/// is over: its result is not taken, its thread goes on. Results are kept and delivered while the store is away.
class Worker {
 public:
  Worker(Client client, Agent agent, WorkerOptions options = {});

  /// Works until ``stop`` is requested, a drain command of the store, max_rollouts, SIGINT or SIGTERM. Throws
  /// Error when the store refuses it.
  void run(const Stop& stop = Stop());

 private:
  struct Shared;
  static void attend(const std::shared_ptr<Shared>& shared, const std::shared_ptr<Task>& task);
  static std::optional<v1::Failure> execute(const std::shared_ptr<Shared>& shared, const std::shared_ptr<Task>& task);
  static std::optional<v1::Failure> call(const Agent& agent, Task& task);
  bool react(LeaseEvent& event);
  void take(v1::LeasedRollout work);
  bool obey(const v1::WorkerCommand& command);
  void finish();

  std::shared_ptr<Shared> shared_;
};

}  // namespace agl_grpc
