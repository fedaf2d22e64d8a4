"""Where the learner's rollouts come from: tasks, groups asked for, sealed attempts read back."""
