package agl

import (
	"strings"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

// Model is a model endpoint: what an OpenAI client needs.
type Model struct {
	Name               string
	BaseURL            string
	Model              string
	APIKey             string
	SamplingParameters Values
}

// AttemptURL is the interceptor's base URL for one attempt: …/rollout/{rollout}/attempt/{attempt},
// with a trailing /v1 kept at its end.
func AttemptURL(endpoint, rolloutID, attemptID string) string {
	base := strings.TrimSuffix(endpoint, "/")
	versioned := strings.HasSuffix(base, "/v1")
	base = strings.TrimSuffix(base, "/v1") + "/rollout/" + rolloutID + "/attempt/" + attemptID
	if versioned {
		base += "/v1"
	}
	return base
}

// BindModel is the first model of a set, or the one of that name, for one attempt; nil when there is
// none. Behind the interceptor the URL names rollout and attempt, and without a key of its own it
// carries the attempt's credential.
func BindModel(set *pb.ResourceSet, lease *pb.Lease, name string) *Model {
	for _, resource := range set.GetResources() {
		if name != "" && resource.Name != name {
			continue
		}
		if llm := resource.GetLlm(); llm != nil {
			return &Model{resource.Name, llm.Endpoint, llm.Model, llm.ApiKey, FromKeyValues(llm.SamplingParameters)}
		}
		if llm := resource.GetProxyLlm(); llm != nil {
			key := llm.ApiKey
			if key == "" {
				key = lease.AttemptCredential
			}
			url := AttemptURL(llm.Endpoint, lease.RolloutId, lease.AttemptId)
			return &Model{resource.Name, url, llm.Model, key, FromKeyValues(llm.SamplingParameters)}
		}
	}
	return nil
}
