#include <atomic>
#include <csignal>
#include <future>
#include <limits>
#include <thread>

#include "support.hpp"

using namespace agl_grpc_tests;

namespace {

agl_grpc::WorkerOptions quiet(int64_t credits, const std::string& queue = "") {
  agl_grpc::WorkerOptions options;
  options.work.credits = credits;
  if (!queue.empty()) options.work.queues.push_back(queue);
  options.log = [](const std::string&) {};
  return options;
}

std::map<std::string, v1::Rollout> finished(const agl_grpc::Client& client, const std::vector<std::string>& ids) {
  agl_grpc::CallOptions options;
  options.timeout = std::chrono::seconds(60);
  std::map<std::string, v1::Rollout> found;
  for (auto& rollout : client.wait(ids, v1::WAIT_UNTIL_TERMINAL, options)) found[rollout.rollout_id()] = rollout;
  EQUAL(found.size(), ids.size());
  return found;
}

}  // namespace

TEST(a_worker_finishes_every_rollout_while_the_store_is_killed) {
  TestStore store;
  const auto client = store.client();
  std::vector<std::string> inputs;
  for (int number = 0; number < 60; number++) inputs.push_back(std::to_string(number));
  const auto ids = enqueue(client, inputs);
  std::atomic<int> calls{0};
  agl_grpc::Worker worker(
      client,
      [&](agl_grpc::Task& task) {
        if (++calls == 20) {
          store.down(SIGKILL);
          store.up();
        }
        task.emit("thought", {agl_grpc::value("n", task.input())});
        task.reward(std::stod(task.input()));
      },
      quiet(8));
  const agl_grpc::Stop leave;
  auto ended = std::async(std::launch::async, [&] { worker.run(leave); });
  for (const auto& [id, rollout] : finished(client, ids)) EQUAL(rollout.status(), v1::ROLLOUT_STATUS_SUCCEEDED);
  leave.request();
  ended.get();
  v1::ListRewardsRequest request;
  for (const auto& id : ids) request.add_rollout_ids(id);
  EQUAL(client.call(&agl_grpc::Store::ListRewards, request).rewards_size(), 60);
  EQUAL(stored_names(client, ids[0])["thought"], 1);
}

TEST(agents_that_throw_or_hang_fail_their_attempt) {
  const SharedStore store;
  const auto client = store.client();
  auto ids = enqueue(client, {"\"error\"", "\"thing\"", "\"nan\"", "\"text\""}, "q");
  v1::RolloutSpec slow;
  slow.set_queue("q");
  slow.mutable_config()->mutable_timeout()->set_nanos(300'000'000);
  ids.push_back(client.enqueue({slow})[0].rollout_id());
  auto options = quiet(5, "q");
  options.max_rollouts = 5;
  agl_grpc::Worker(
      client,
      [](agl_grpc::Task& task) {
        if (task.input() == "\"error\"") throw std::runtime_error("no such thing\nsecond line");
        if (task.input() == "\"thing\"") throw 42;
        if (task.input() == "\"nan\"") task.reward(std::numeric_limits<double>::quiet_NaN());
        if (task.input() == "\"text\"") throw std::runtime_error("ü\xff");
        task.stop().wait_for(std::chrono::hours(1));
      },
      options)
      .run();
  auto found = finished(client, ids);
  const std::vector<std::string> expected{"no such thing", "the agent threw what is no std::exception",
                                          "the reward \"\" is nan; rewards are finite numbers", "ü?"};
  for (size_t index = 0; index < expected.size(); index++) {
    EQUAL(found[ids[index]].failure().message(), expected[index]);
    EQUAL(found[ids[index]].failure().kind(), v1::FAILURE_KIND_AGENT);
  }
  EQUAL(found[ids[4]].status(), v1::ROLLOUT_STATUS_FAILED);
}

TEST(a_cancelled_agent_is_told_and_a_drained_worker_leaves) {
  const TestStore store;  // what is cancelled and drained is named without a run
  const auto client = store.client();
  const auto ids = enqueue(client, {"1"});
  std::promise<void> told;
  auto options = quiet(1);
  options.work.worker_id = "drained";
  agl_grpc::Worker worker(
      client,
      [&](agl_grpc::Task& task) {
        v1::CancelRolloutsRequest request;
        request.mutable_filter()->add_rollout_id_in(ids[0]);
        request.set_reason("enough");
        client.call(&agl_grpc::Store::CancelRollouts, request);
        if (task.stop().wait_for(std::chrono::seconds(30))) told.set_value();
      },
      options);
  auto ended = std::async(std::launch::async, [&] { worker.run(); });
  told.get_future().get();
  v1::DrainWorkersRequest drain;
  drain.add_worker_ids("drained");
  client.call(&agl_grpc::Store::DrainWorkers, drain);
  ended.get();
  EQUAL(finished(client, ids)[ids[0]].status(), v1::ROLLOUT_STATUS_CANCELLED);
}

TEST(a_worker_that_is_told_to_leave_hands_back_what_its_agents_do_not_end) {
  const SharedStore store;
  const auto client = store.client();
  const auto ids = enqueue(client, {"1"});
  std::promise<void> begun;
  auto options = quiet(1);
  options.grace = std::chrono::milliseconds(100);
  agl_grpc::Worker worker(
      client,
      [&](agl_grpc::Task& task) {
        begun.set_value();
        task.stop().wait_for(std::chrono::seconds(60));
      },
      options);
  auto ended = std::async(std::launch::async, [&] { worker.run(); });
  begun.get_future().get();
  raise(SIGTERM);
  ended.get();
  auto next = quiet(1);
  next.max_rollouts = 1;
  agl_grpc::Worker(client, [](agl_grpc::Task& task) { task.reward(1); }, next).run();
  EQUAL(finished(client, ids)[ids[0]].status(), v1::ROLLOUT_STATUS_SUCCEEDED);
}

TEST(the_url_of_an_attempt) {
  EQUAL(agl_grpc::attempt_url("http://h:1/v1", "r", "a"), "http://h:1/rollout/r/attempt/a/v1");
  EQUAL(agl_grpc::attempt_url("http://h:1/", "r", "a"), "http://h:1/rollout/r/attempt/a");
}
