package agl

import (
	"fmt"
	"math"
	"reflect"
	"sort"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

// Values are attributes, notes or statistics by name. A value is nil, a bool, a string, a number,
// []byte, a slice or a map with string keys of such values.
type Values map[string]interface{}

// KeyValues are values as the contract's, in the order of their names.
func (v Values) KeyValues() ([]*pb.KeyValue, error) {
	names := make([]string, 0, len(v))
	for name := range v {
		names = append(names, name)
	}
	sort.Strings(names)
	entries := make([]*pb.KeyValue, 0, len(v))
	for _, name := range names {
		value, err := ToAnyValue(v[name])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		entries = append(entries, &pb.KeyValue{Key: name, Value: value})
	}
	return entries, nil
}

// FromKeyValues reads values; of a repeated name the last one counts.
func FromKeyValues(entries []*pb.KeyValue) Values {
	values := make(Values, len(entries))
	for _, entry := range entries {
		values[entry.Key] = FromAnyValue(entry.Value)
	}
	return values
}

// ToAnyValue writes one value.
func ToAnyValue(value interface{}) (*pb.AnyValue, error) {
	switch value := value.(type) {
	case nil:
		return &pb.AnyValue{}, nil
	case string:
		return &pb.AnyValue{Value: &pb.AnyValue_StringValue{StringValue: value}}, nil
	case []byte:
		return &pb.AnyValue{Value: &pb.AnyValue_BytesValue{BytesValue: value}}, nil
	}
	reflected := reflect.ValueOf(value)
	switch reflected.Kind() {
	case reflect.Bool:
		return &pb.AnyValue{Value: &pb.AnyValue_BoolValue{BoolValue: reflected.Bool()}}, nil
	case reflect.String:
		return &pb.AnyValue{Value: &pb.AnyValue_StringValue{StringValue: reflected.String()}}, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return &pb.AnyValue{Value: &pb.AnyValue_IntValue{IntValue: reflected.Int()}}, nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if reflected.Uint() > math.MaxInt64 {
			return nil, fmt.Errorf("%d is larger than a signed 64-bit integer", reflected.Uint())
		}
		return &pb.AnyValue{Value: &pb.AnyValue_IntValue{IntValue: int64(reflected.Uint())}}, nil
	case reflect.Float32, reflect.Float64:
		return &pb.AnyValue{Value: &pb.AnyValue_DoubleValue{DoubleValue: reflected.Float()}}, nil
	case reflect.Slice, reflect.Array:
		return arrayValue(reflected)
	case reflect.Map:
		return mapValue(reflected)
	}
	return nil, fmt.Errorf("a %T cannot be an attribute's value", value)
}

func arrayValue(list reflect.Value) (*pb.AnyValue, error) {
	array := &pb.ArrayValue{}
	for i := 0; i < list.Len(); i++ {
		element, err := ToAnyValue(list.Index(i).Interface())
		if err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		array.Values = append(array.Values, element)
	}
	return &pb.AnyValue{Value: &pb.AnyValue_ArrayValue{ArrayValue: array}}, nil
}

func mapValue(entries reflect.Value) (*pb.AnyValue, error) {
	if entries.Type().Key().Kind() != reflect.String {
		return nil, fmt.Errorf("a map with keys of type %s cannot be an attribute's value", entries.Type().Key())
	}
	values := Values{}
	for _, key := range entries.MapKeys() {
		values[key.String()] = entries.MapIndex(key).Interface()
	}
	list, err := values.KeyValues()
	return &pb.AnyValue{Value: &pb.AnyValue_KvlistValue{KvlistValue: &pb.KeyValueList{Values: list}}}, err
}

// FromAnyValue reads one value: integers as int64, numbers as float64, lists as []interface{},
// named values as Values.
func FromAnyValue(message *pb.AnyValue) interface{} {
	switch value := message.GetValue().(type) {
	case *pb.AnyValue_StringValue:
		return value.StringValue
	case *pb.AnyValue_BoolValue:
		return value.BoolValue
	case *pb.AnyValue_IntValue:
		return value.IntValue
	case *pb.AnyValue_DoubleValue:
		return value.DoubleValue
	case *pb.AnyValue_BytesValue:
		return value.BytesValue
	case *pb.AnyValue_ArrayValue:
		list := make([]interface{}, 0, len(value.ArrayValue.Values))
		for _, element := range value.ArrayValue.Values {
			list = append(list, FromAnyValue(element))
		}
		return list
	case *pb.AnyValue_KvlistValue:
		return FromKeyValues(value.KvlistValue.Values)
	}
	return nil
}
