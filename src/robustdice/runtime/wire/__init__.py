"""What goes over the network, and who may: messages, sockets, the cluster file and its keys."""
