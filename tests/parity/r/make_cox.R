# What R's survival package says of the tables of tests/parity/test_cox.py, as cox_*.json beside this file.
#
#   python tests/parity/test_cox.py FOLDER                  writes the tables: time, event, stratum, then covariates
#   Rscript tests/parity/r/make_cox.R FOLDER tests/parity/r
#
# Made with R 4.2.2 and survival 3.5-3.
library(survival)
library(jsonlite)

folders <- commandArgs(trailingOnly = TRUE)
exact <- coxph.control(eps = 1e-15, toler.chol = 1e-16, iter.max = 50, timefix = FALSE)
transforms <- c("km", "rank", "log", "identity")

# All 17 digits: jsonlite stops at 15, so numbers are written as text and the quotation marks taken off again.
write_exact <- function(value, name) {
  digits <- function(v) {
    if (is.list(v)) lapply(v, digits)
    else if (is.matrix(v)) lapply(seq_len(nrow(v)), function(i) digits(unname(v[i, ])))
    else if (is.numeric(v)) ifelse(is.na(v), NA, sprintf("%.17g", v))
    else v
  }
  text <- toJSON(digits(value), auto_unbox = TRUE, na = "null")
  writeLines(gsub('"(-?[0-9][0-9.e+-]*)"', "\\1", text), file.path(folders[2], paste0("cox_", name, ".json")))
}

model <- function(table, ties, time = "time", robust = FALSE, wrap = function(x) x) {
  covariates <- setdiff(names(table), c("time", "event", "stratum", "later"))
  terms <- wrap(covariates)
  if (length(unique(table$stratum)) > 1) terms <- c(terms, "strata(stratum)")
  formula <- as.formula(paste0("Surv(", time, ", event) ~ ", paste(terms, collapse = " + ")))
  environment(formula) <- environment()
  # Cox models look their call up again, so the call must hold the table itself.
  eval(bquote(coxph(.(formula), data = .(table), ties = .(ties), control = exact, robust = .(robust), x = TRUE, y = TRUE)))
}

one <- function(table, ties, pictures) {
  fit <- suppressWarnings(model(table, ties))
  robust <- suppressWarnings(model(table, ties, robust = TRUE))
  # Our ranks put events before those who are censored at the same time; R's are the same once these leave a little later.
  table$later <- table$time + 0.25 * (1 - table$event)
  later <- suppressWarnings(model(table, ties, time = "later"))
  possible <- if (any(table$event == 1 & table$time <= 0)) setdiff(transforms, "log") else transforms
  zph <- lapply(possible, function(t) cox.zph(if (t == "rank") later else fit, transform = t))
  names(zph) <- possible
  out <- list(
    names = names(coef(fit)), coef = unname(coef(fit)), se = unname(sqrt(diag(fit$var))),
    loglik = fit$loglik[2], loglik_null = fit$loglik[1],
    score = unname(fit$score), wald = unname(fit$wald.test),
    robust_se = unname(sqrt(diag(robust$var))), robust_wald = unname(robust$wald.test),
    zph = lapply(zph, function(z) unname(z$table))
  )
  if (pictures) {
    km <- zph$km
    times <- sort(unique(km$time))
    out$residual_time <- times
    out$residual_scaled <- t(sapply(times, function(t) colMeans(km$y[km$time == t, , drop = FALSE], na.rm = TRUE)))
    out$residual_scaled[is.nan(out$residual_scaled)] <- NA
    base <- basehaz(fit, centered = FALSE)
    if (is.null(base$strata)) base$strata <- factor("0")
    base$stratum <- as.numeric(sub("stratum=", "", as.character(base$strata)))
    happened <- unique(table[table$event == 1, c("time", "stratum")])
    base <- merge(base, happened)
    base <- base[order(base$stratum, base$time), ]
    out$baseline_time <- base$time
    out$baseline_stratum <- base$stratum
    out$baseline_hazard <- base$hazard
  }
  out
}

for (name in c("rossi", "gbsg2", "flchain", "veteran", "nested", "lung")) {
  table <- read.csv(file.path(folders[1], paste0(name, ".csv")), check.names = FALSE)
  pictures <- name != "flchain"
  write_exact(list(efron = one(table, "efron", pictures), breslow = one(table, "breslow", pictures)), name)
}

theta <- 20
table <- read.csv(file.path(folders[1], "rossi.csv"))
fit <- model(table, "efron", wrap = function(x) paste0("ridge(", x, ", theta = ", theta, ", scale = FALSE)"))
# Not cox.zph: it adds the vector of penalties to every row of the information (survival 3.5-3), which is no test.
write_exact(list(
  theta = theta, coef = unname(coef(fit)), se = unname(sqrt(diag(fit$var))), df = fit$df,
  loglik = fit$loglik[2], loglik_null = fit$loglik[1], wald = unname(fit$wald.test)
), "ridge")
