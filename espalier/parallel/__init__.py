"""Training in several processes: replicas of a network, and shards of one."""
