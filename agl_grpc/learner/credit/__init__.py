"""What a rollout's reward means for its tokens: advantages and corrections over rollouts instead of rows."""
