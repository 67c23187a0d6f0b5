"""What learns: the world model, the behavior trained inside it, and the learner that updates both."""
