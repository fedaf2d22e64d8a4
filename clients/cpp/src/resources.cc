#include <cmath>

#include "agl_grpc/worker.hpp"

namespace agl_grpc {
namespace {

bool strip(std::string* text, const std::string& end) {
  if (text->size() < end.size() || text->compare(text->size() - end.size(), end.size(), end) != 0) return false;
  text->resize(text->size() - end.size());
  return true;
}

std::string random_bytes(size_t count) {
  std::string bytes;
  for (const std::string digits = new_id() + new_id(); bytes.size() < count;) {
    bytes += static_cast<char>(std::stoi(digits.substr(bytes.size() * 2, 2), nullptr, 16));
  }
  return bytes;
}

}  // namespace

std::string attempt_url(std::string endpoint, const std::string& rollout_id, const std::string& attempt_id) {
  strip(&endpoint, "/");
  const bool versioned = strip(&endpoint, "/v1");
  return endpoint + "/rollout/" + rollout_id + "/attempt/" + attempt_id + (versioned ? "/v1" : "");
}

std::optional<Model> bind_model(const v1::ResourceSet& set, const v1::Lease& lease, const std::string& name) {
  for (const auto& resource : set.resources()) {
    if (!name.empty() && resource.name() != name) continue;
    if (resource.has_llm()) {
      const auto& llm = resource.llm();
      return Model{resource.name(), llm.endpoint(), llm.model(), llm.api_key(), llm.sampling_parameters()};
    }
    if (resource.has_proxy_llm()) {
      const auto& llm = resource.proxy_llm();
      return Model{resource.name(), attempt_url(llm.endpoint(), lease.rollout_id(), lease.attempt_id()), llm.model(),
                   llm.api_key().empty() ? lease.attempt_credential() : llm.api_key(), llm.sampling_parameters()};
    }
  }
  return std::nullopt;
}

Task::Task(v1::LeasedRollout work, std::shared_ptr<SpanStreamer> spans, Stop stop)
    : work_(std::move(work)),
      model_(bind_model(work_.resources(), work_.lease())),
      spans_(std::move(spans)),
      stop_(std::move(stop)) {}

void Task::reward(double value, const std::string& name) {
  v1::Reward reward;
  reward.set_name(name);
  reward.set_value(value);
  add_reward(std::move(reward));
}

void Task::add_reward(v1::Reward reward) {
  if (!reward.has_value() || !std::isfinite(reward.value())) {
    const std::string found = reward.has_value() ? std::to_string(reward.value()) : "not set";
    throw std::invalid_argument("the reward \"" + reward.name() + "\" is " + found + "; rewards are finite numbers");
  }
  std::lock_guard lock(mutex_);
  rewards_.push_back(std::move(reward));
}

void Task::emit(const std::string& name, const std::vector<v1::KeyValue>& attributes) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto nanos = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
  v1::AttemptSpans group;
  group.set_rollout_id(rollout().rollout_id());
  group.set_attempt_id(attempt().attempt_id());
  auto* span = group.add_spans();
  const std::string ids = random_bytes(24);
  span->set_trace_id(ids.substr(0, 16));
  span->set_span_id(ids.substr(16));
  span->set_name(name);
  span->set_start_time_unix_nano(nanos);
  span->set_end_time_unix_nano(nanos);
  for (const auto& entry : attributes) *span->add_attributes() = entry;
  const SpanAck ack = spans_->send(std::move(group));
  if (!ack.rejected.empty()) throw ack.rejected.front().error;
}

}  // namespace agl_grpc
