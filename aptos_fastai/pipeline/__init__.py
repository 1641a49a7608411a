"Stages, graph, scores, pseudo-labels, summary."
