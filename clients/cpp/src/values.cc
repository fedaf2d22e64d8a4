#include "agl_grpc/values.hpp"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <google/protobuf/wrappers.pb.h>

#include <stdexcept>

namespace agl_grpc {
namespace {

std::string json_of(const google::protobuf::Message& message) {
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text);
  if (!status.ok()) throw std::invalid_argument("a value has no JSON: " + status.ToString());
  return text;
}

std::string json_text(const std::string& text) {
  google::protobuf::StringValue wrapped;
  wrapped.set_value(text);
  return json_of(wrapped);
}

std::string json_value(const v1::AnyValue& value) {
  switch (value.value_case()) {
    case v1::AnyValue::kStringValue:
      return json_text(value.string_value());
    case v1::AnyValue::kBoolValue:
      return value.bool_value() ? "true" : "false";
    case v1::AnyValue::kIntValue:
      return std::to_string(value.int_value());
    case v1::AnyValue::kDoubleValue: {
      google::protobuf::DoubleValue wrapped;
      wrapped.set_value(value.double_value());
      return json_of(wrapped);
    }
    case v1::AnyValue::kBytesValue: {
      google::protobuf::BytesValue wrapped;
      wrapped.set_value(value.bytes_value());
      return json_of(wrapped);
    }
    case v1::AnyValue::kArrayValue: {
      std::string list;
      for (const auto& element : value.array_value().values()) list += (list.empty() ? "" : ",") + json_value(element);
      return "[" + list + "]";
    }
    case v1::AnyValue::kKvlistValue:
      return to_json(value.kvlist_value().values());
    default:
      return "null";
  }
}

}  // namespace

const v1::AnyValue* find(const Values& values, const std::string& name) {
  const v1::AnyValue* found = nullptr;
  for (const auto& entry : values) {
    if (entry.key() == name) found = &entry.value();
  }
  return found;
}

std::string to_json(const Values& values) {
  std::map<std::string, std::string> members;  // of a repeated name the last one counts
  for (const auto& entry : values) members[entry.key()] = json_value(entry.value());
  std::string object;
  for (const auto& [key, text] : members) object += (object.empty() ? "" : ",") + json_text(key) + ":" + text;
  return "{" + object + "}";
}

}  // namespace agl_grpc
