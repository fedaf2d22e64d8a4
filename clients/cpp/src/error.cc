#include "agl_grpc/error.hpp"

#include <sstream>

#include "agl_grpc_wire/status.pb.h"

namespace agl_grpc {
namespace {

constexpr char kDomain[] = "agl-grpc";
constexpr char kPrefix[] = "ERROR_REASON_";
/// What gRPC itself says of a message over this process's own limit.
constexpr char kOwnLimit[] = "larger than";

std::string one_line(const std::string& text) {
  std::istringstream words(text);
  std::string line, word;
  while (words >> word) line += (line.empty() ? "" : " ") + word;
  return line;
}

template <typename Detail>
bool unpack(const google::protobuf::Any& any, const char* name, Detail* detail) {
  const std::string& url = any.type_url();
  return url.substr(url.rfind('/') + 1) == name && detail->ParseFromString(any.value());
}

std::string name_of(v1::ErrorReason reason) {
  return v1::ErrorReason_Name(reason).substr(sizeof(kPrefix) - 1);
}

}  // namespace

Error::Error(grpc::StatusCode code_, std::string reason_, std::string message)
    : std::runtime_error((reason_.empty() ? std::string() : reason_ + ": ") + one_line(message)),
      code(code_),
      reason(std::move(reason_)) {}

bool Error::is(v1::ErrorReason expected) const {
  return reason == name_of(expected);
}

bool Error::transient() const {
  switch (code) {
    case grpc::StatusCode::UNAVAILABLE:
      return true;
    case grpc::StatusCode::CANCELLED:
      return reason.empty();
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return retry_after.count() > 0;
    default:
      return false;
  }
}

Error error_from(const grpc::Status& status, const std::string& target) {
  agl_grpc_wire::Status details;
  agl_grpc_wire::ErrorInfo info;
  agl_grpc_wire::RetryInfo retry;
  std::chrono::nanoseconds retry_after{0};
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      agl_grpc_wire::ErrorInfo found;
      if (unpack(any, "google.rpc.ErrorInfo", &found) && found.domain() == kDomain) info = found;
      if (unpack(any, "google.rpc.RetryInfo", &retry)) {
        retry_after =
            std::chrono::seconds(retry.retry_delay().seconds()) + std::chrono::nanoseconds(retry.retry_delay().nanos());
      }
    }
  }
  if (info.reason().empty() && status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED &&
      status.error_message().find(kOwnLimit) != std::string::npos) {
    info.set_reason(name_of(v1::ERROR_REASON_MESSAGE_TOO_LARGE));
    (*info.mutable_metadata())["limit_bytes"] = std::to_string(kMaxMessageBytes);
  }
  const bool away = status.error_code() == grpc::StatusCode::UNAVAILABLE ||
                    status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED;
  std::string message = status.error_message();
  if (away && info.reason().empty()) message = "the store at " + target + " cannot be reached: " + message;
  Error error(status.error_code(), info.reason(), message);
  error.info.insert(info.metadata().begin(), info.metadata().end());
  error.retry_after = retry_after;
  return error;
}

Error error_from(const v1::ItemStatus& item) {
  Error error(static_cast<grpc::StatusCode>(item.code()), name_of(item.reason()), item.message());
  for (const auto& label : item.metadata()) error.info[label.key()] = label.value();
  return error;
}

}  // namespace agl_grpc
