#include <atomic>
#include <csignal>
#include <future>
#include <thread>

#include "support.hpp"

using namespace agl_grpc_tests;

namespace {

template <typename Event>
Event await(agl_grpc::LeaseStream& stream) {
  for (;;) {
    auto event = stream.next(std::chrono::seconds(60));
    if (!event) throw Failed("the event did not come within 60 s");
    if (auto* found = std::get_if<Event>(&*event)) return std::move(*found);
    if (std::holds_alternative<agl_grpc::Lost>(*event)) throw Failed("the lease was lost");
  }
}

v1::Completion succeeded() {
  v1::Completion completion;
  completion.set_status(v1::ATTEMPT_STATUS_SUCCEEDED);
  return completion;
}

agl_grpc::LeaseOptions work(const std::string& worker_id, const std::string& queue = "") {
  agl_grpc::LeaseOptions options;
  options.worker_id = worker_id;
  options.credits = 1;
  if (!queue.empty()) options.queues.push_back(queue);
  return options;
}

}  // namespace

TEST(spans_are_acknowledged_and_bad_ones_named) {
  const SharedStore store;
  const auto client = store.client();
  const auto group = started(client);
  const auto spans = client.spans();
  auto large = span("large"), early = span("early");
  *large.add_attributes() = agl_grpc::value("x", std::string(5 << 20, 'x'));
  // A clock that is a day and more ahead.
  early.set_start_time_unix_nano(early.start_time_unix_nano() + 25ULL * 3600 * 1'000'000'000);
  early.set_end_time_unix_nano(early.start_time_unix_nano());
  const auto ack = spans->send({with(group, {span("a"), span(""), large, early}), with(group, {span("c")})});
  EQUAL(ack.durability, v1::DURABILITY_DISK);
  EQUAL(ack.rejected.size(), 3U);
  for (const auto& rejected : ack.rejected) {
    EQUAL(rejected.group, 0);
    HOLDS(rejected.index >= 1);
    HOLDS(rejected.error.is(v1::ERROR_REASON_INVALID_FIELD));
  }
  spans->close();
  HOLDS(stored_names(client, group.rollout_id()) == (std::map<std::string, int>{{"a", 1}, {"c", 1}}));
}

TEST(a_group_larger_than_a_message_is_cut) {
  const SharedStore store;
  const auto client = store.client();
  auto group = started(client);
  const std::string rollout = group.rollout_id();
  for (int number = 0; number < 2500; number++) {
    auto* one = group.add_spans();
    *one = span("s-" + std::to_string(number));
    *one->add_attributes() = agl_grpc::value("x", std::string(1000, 'x'));
  }
  group.mutable_spans(2100)->clear_name();
  const auto spans = client.spans();
  const auto ack = spans->send(std::move(group));
  EQUAL(ack.rejected.size(), 1U);
  EQUAL(ack.rejected[0].index, 2100);
  spans->close();
  EQUAL(stored_names(client, rollout).size(), 2499U);
}

TEST(no_span_is_lost_or_doubled_when_the_store_is_killed) {
  TestStore store;
  const auto client = store.client();
  const auto group = started(client);
  const auto spans = client.spans();
  std::vector<std::future<agl_grpc::SpanAck>> acks;
  for (int number = 0; number < 3000; number++) {
    if (number == 800 || number == 1600 || number == 2400) {
      store.down(SIGKILL);
      if (number == 1600) acks.back().wait_for(std::chrono::milliseconds(200));  // some are sent into nothing
      store.up();
    }
    acks.push_back(spans->submit({with(group, {span("s-" + std::to_string(number))})}));
    if (number % 100 == 99) acks.back().wait();
  }
  for (auto& ack : acks) HOLDS(ack.get().rejected.empty());
  spans->close();
  const auto names = stored_names(client, group.rollout_id());
  EQUAL(names.size(), 3000U);
  for (const auto& [name, times] : names) HOLDS(times == 1);
}

TEST(a_newer_streamer_fences_the_older) {
  const SharedStore store;
  const auto client = store.client();
  const auto group = started(client);
  const auto older = client.spans("one"), newer = client.spans("one");
  // Whichever of the two opened its stream last is the newer.
  std::optional<agl_grpc::Error> told;
  eventually("one is told", [&] {
    for (const auto* one : {&older, &newer}) {
      try {
        (*one)->send(with(group, {span("x")}));
      } catch (const agl_grpc::Error& error) {
        told = error;
      }
    }
    return told.has_value();
  });
  HOLDS(told->is(v1::ERROR_REASON_STREAM_FENCED));
}

TEST(what_is_given_up_when_the_store_stays_away_is_said) {
  TestStore store;
  const auto client = store.client();
  const auto group = started(client);
  const auto spans = client.spans();
  spans->send(with(group, {span("there")}));
  store.down(SIGKILL);
  auto lost = spans->submit({with(group, {span("lost")})});
  const auto begun = std::chrono::steady_clock::now();
  const auto error = error_of([&] { spans->close(std::chrono::milliseconds(200)); });
  HOLDS(std::chrono::steady_clock::now() - begun < std::chrono::seconds(5));
  HOLDS(std::string(error.what()).find("given up") != std::string::npos);
  HOLDS(std::string(error_of([&] { lost.get(); }).what()).find("given up") != std::string::npos);
}

TEST(memory_is_bounded_while_the_store_is_away) {
  TestStore store;
  const auto client = store.client();
  const auto group = started(client);
  const auto spans = client.spans();
  store.down(SIGKILL);
  auto large = span("large");
  *large.add_attributes() = agl_grpc::value("x", std::string(900 << 10, 'x'));
  std::atomic<int> taken{0};
  std::vector<std::future<agl_grpc::SpanAck>> acks;
  auto sender = std::async(std::launch::async, [&] {
    for (int number = 0; number < 100; number++) {
      large.set_span_id(agl_grpc::new_id().substr(0, 8));
      acks.push_back(spans->submit({with(group, {large})}));
      taken++;
    }
  });
  eventually("the buffer is full", [&] { return taken >= 70; });
  HOLDS(sender.wait_for(std::chrono::milliseconds(300)) == std::future_status::timeout);
  HOLDS(taken < 75);
  store.up();
  sender.get();
  for (auto& ack : acks) HOLDS(ack.get().rejected.empty());
  spans->close();
  EQUAL(stored_names(client, group.rollout_id())["large"], 100);
}

TEST(credits_bound_what_is_delivered_and_rewards_travel_with_the_completion) {
  const SharedStore store;
  const auto client = store.client();
  const auto stream = client.lease(work("credits"));
  const auto ids = enqueue(client, {"1", "2"});
  const auto first = await<agl_grpc::Delivered>(*stream).work;
  while (auto event = stream->next(std::chrono::milliseconds(300)))
    HOLDS(!std::holds_alternative<agl_grpc::Delivered>(*event));
  EQUAL(stream->held().size(), 1U);
  auto completion = succeeded();
  completion.add_rewards()->set_value(0.5);
  EQUAL(stream->complete(first.lease(), completion).rollout_id(), first.rollout().rollout_id());
  stream->grant();
  const auto second = await<agl_grpc::Delivered>(*stream).work;
  stream->complete(second.lease(), succeeded());
  EQUAL(client.wait(ids).size(), 2U);
  v1::ListRewardsRequest request;
  request.add_rollout_ids(first.rollout().rollout_id());
  EQUAL(client.call(&agl_grpc::Store::ListRewards, request).rewards(0).value(), 0.5);
  HOLDS(stream->held().empty());
  stream->close();
}

TEST(leases_survive_a_kill_of_the_store) {
  TestStore store;
  const auto client = store.client();
  auto options = work("kill");
  options.lease = std::chrono::milliseconds(1500);
  const auto stream = client.lease(options);
  enqueue(client, {"1"});
  const auto lease = await<agl_grpc::Delivered>(*stream).work.lease();
  store.down(SIGKILL);
  await<agl_grpc::Disconnected>(*stream);
  store.up();
  await<agl_grpc::Connected>(*stream);
  std::this_thread::sleep_for(std::chrono::seconds(2));  // longer than the lease: only renewals keep it
  stream->complete(lease, succeeded());
  HOLDS(error_of([&] { stream->complete(lease, succeeded()); }).code == grpc::StatusCode::FAILED_PRECONDITION);
  stream->close();
}

TEST(a_lost_lease_is_told_and_its_late_result_refused) {
  const SharedStore store;
  const auto client = store.client();
  auto options = work("lost");
  options.lease = std::chrono::seconds(1);
  const auto stream = client.lease(options);
  enqueue(client, {"1"});
  const auto lease = await<agl_grpc::Delivered>(*stream).work.lease();
  v1::ExpireLeasesRequest request;
  request.add_attempt_ids(lease.attempt_id());
  client.call(&agl_grpc::Store::ExpireLeases, request);
  for (bool told = false; !told;) {
    auto event = stream->next(std::chrono::seconds(30));
    HOLDS(event.has_value());
    told = std::holds_alternative<agl_grpc::Lost>(*event) || std::holds_alternative<agl_grpc::Commanded>(*event);
  }
  HOLDS(error_of([&] { stream->complete(lease, succeeded()); }).is(v1::ERROR_REASON_LEASE_LOST));
  stream->close();
}

TEST(what_is_held_is_handed_back_at_the_close) {
  const SharedStore store;
  const auto client = store.client();
  const auto ids = enqueue(client, {"1"}, "back");
  const auto stream = client.lease(work("back", "back"));
  await<agl_grpc::Delivered>(*stream);
  stream->close();
  const auto again = client.lease(work("again", "back"));
  EQUAL(await<agl_grpc::Delivered>(*again).work.rollout().rollout_id(), ids[0]);
}
